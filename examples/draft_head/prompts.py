"""Prompts for training a head that drafts: kinds of questions over topics, as JSONL with `messages`.

python examples/draft_head/prompts.py > prompts.jsonl
"""

from __future__ import annotations

import json
import random

KINDS = (
    "Explain {} to a child.",
    "Write a short story about {}.",
    "Give me five facts about {}.",
    "What should a beginner know about {}?",
    "Why does {} matter?",
    "Write a friendly letter to a friend about {}.",
    "Describe {} in one paragraph.",
    "Write a short introduction to an article on {}.",
    "What are the advantages and disadvantages of {}?",
    "Give step by step advice for someone who wants to learn about {}.",
)
TOPICS = (
    *("rain", "bees", "bread", "the moon", "old maps", "volcanoes", "clocks", "libraries", "bicycles", "honey"),
    *("the sea", "winter", "trains", "gardens", "music", "paper", "glass", "bridges", "sleep", "friendship"),
    *("cooking", "birds", "deserts", "rivers", "painting", "mathematics", "chess", "swimming", "markets", "cheese"),
    *("tea", "mountains", "forests", "fire", "kites", "museums", "dogs", "cats", "horses", "stars"),
    *("electricity", "computers", "letters", "farming", "soap", "salt", "copper", "wool", "whales", "elephants"),
    *("languages", "football", "photography", "teaching", "money", "cities", "islands", "castles", "medicine", "maps"),
)


def main() -> None:
    asked = [kind.format(topic) for topic in dict.fromkeys(TOPICS) for kind in KINDS]
    random.Random(0).shuffle(asked)
    for text in asked:
        print(json.dumps({"messages": [{"role": "user", "content": text}]}))


if __name__ == "__main__":
    main()
