"""The OpenAI-compatible router: picks an arm per request, rewrites the model's name, passes answers on, and counts."""
