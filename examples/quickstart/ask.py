"""One ticket to one or more models through the router, with the official OpenAI client: ask.py MODEL...

The client finds the router through OPENAI_BASE_URL and OPENAI_API_KEY (`eval "$(finetune local env)"`).
"""

from __future__ import annotations

import sys

import openai

TICKET = "Why did 85 euros leave my bank account twice for Nursery? I bought it only once."


def main() -> None:
    client = openai.OpenAI()
    for model in sys.argv[1:]:
        answer = client.chat.completions.create(
            model=model,
            messages=[
                {
                    "role": "system",
                    "content": "Triage the support ticket. Answer with JSON: category, priority, summary.",
                },
                {"role": "user", "content": TICKET},
            ],
            max_tokens=64,
            temperature=0,
            user="ingrid",
        )
        print(f"{model}: {answer.choices[0].message.content}")


if __name__ == "__main__":
    main()
