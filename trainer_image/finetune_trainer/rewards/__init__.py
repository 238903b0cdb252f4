"""What sampled answers are worth: users' functions and reward models."""
