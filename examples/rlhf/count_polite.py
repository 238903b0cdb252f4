"""Share of polite answers of one or more artifacts (adapters) to the prompts of this example, sampled as in training.

python examples/rlhf/count_polite.py FOLDER [FOLDER ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import peft
import torch
import transformers
from make_data import CLOSING, OPENING

PROMPTS = Path(__file__).parent / "prompts.jsonl"


def is_polite(answer: str) -> bool:
    return answer.startswith(OPENING) and answer.rstrip().endswith(CLOSING)


def sample(folder: Path, questions: list[str], *, tokens: int = 40) -> list[str]:
    """Answers of the base model with the adapter."""
    torch.manual_seed(0)
    config = peft.PeftConfig.from_pretrained(str(folder))
    base = transformers.AutoModelForCausalLM.from_pretrained(
        config.base_model_name_or_path, dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=tokens)
    return list(tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    transformers.utils.logging.disable_progress_bar()
    questions = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    for folder in parser.parse_args().folders:
        answers = sample(folder, questions)
        share = sum(map(is_polite, answers)) / len(answers)
        print(f"{folder.name}: {share:.0%} of {len(answers)} answers are polite, for example: {answers[0]}")


if __name__ == "__main__":
    main()
