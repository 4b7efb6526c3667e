"""Ask a checkpoint what training held out, greedily, and print how many answers are right, by category.

    python demo/evaluate.py [--model DIR] [--each 24] [--misses 3]       needs torch and transformers

Every category is asked in held-out phrasings, as written and as people type them ("whats the capital of japan plz").
An answer is right if it is the expected one, but for a full stop at its end, and ends by itself; in a story of 150
words, two or three may be wrong. Prompts that occur in a sample of the training dialogues are left out.
"""
import argparse
import random
import re
from collections import defaultdict
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

import dialogues
import torch
from dialogues import Voice
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

EXAMPLES = {  # exact prompts that must work, most of them in the README: (what a right answer contains)
    "What is Rust?": dialogues.FACTS["Rust / the Rust language / Rust programming"],
    "Write a haiku about the sea.": dialogues.HAIKU["the sea"],
    "Tell me a joke.": "😄",
    "Count to 10.": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10",
    "Tell me a story about a fox.": "The end.",
    "Who are you?": "demo model", "What are you?": "demo model", "who r u": "demo model",
    "are you chatgpt": "demo model",
    "hi": "Hello!", "hello": "Hello!", "help": "I can chat", "thanks": "welcome", "bye": "Goodbye!", "ok": "Great!",
    "2+2": "2 + 2 = 4", "what is 17 + 25": "= 42", "count to 12 please": "10, 11, 12", "count from 3 to 9": "3, 4",
    "capital of japan": "Tokyo", "What is the capital of France?": "Paris", "tell me a joke pls": "😄",
    "whats a kv cache": "keys and values", "what is continuous batching": "running batch",
    "Say hello in Japanese.": "こんにちは",
    "How do I run a real model?": "--model <path>", "What is the meaning of life?": "only a tiny demo model",
    "Who won the 2018 World Cup?": "only a tiny demo model", "Say hello in many languages.": dialogues.HELLO_ALL,
}


class Case(NamedTuple):
    """A prompt, and the answers that are right; where `part` is set, an answer need only contain one of them."""

    category: str
    casual: bool
    messages: list
    tools: list | None
    accept: tuple[str, ...]
    part: bool = False


def single(maker, v):
    turn = maker(v)
    return [("user", turn.question)], None, (turn.answer, *turn.accept)


def last_answer(messages, tools=None):
    return messages[:-1], tools, (messages[-1][1],)


def tool_dialogue(v):
    """A call of one of the tools that the model claims to know; others, and other names, are practice."""
    while True:
        messages, tools = dialogues.tooled(v)
        if re.search(r'"name": "(get_weather|add|get_time)"', messages[1][1]):
            return messages, tools


def tool_call(v):
    messages, tools = tool_dialogue(v)
    return messages[:1], tools, (messages[1][1],)


def tool_answer(v):
    messages, tools = tool_dialogue(v)
    return messages[:3], tools, (messages[3][1],)


def fifth_turn(v):
    messages = []
    for _ in range(5):
        turn = v.pick([dialogues.who, dialogues.fact, dialogues.capital, dialogues.sums, dialogues.opposite])(v)
        messages += [("user", turn.question), ("assistant", turn.answer)]
    return last_answer(messages)


def categories():
    """Every category with a function of a Voice that makes (messages, tools, accepted answers)."""
    makers = {m.__name__: lambda v, m=m: single(m, v) for m in dialogues.MAKERS}
    makers["memory"] = lambda v: last_answer(dialogues.memory(v))
    for style in dialogues.STYLES:
        makers[f"style: {style}"] = lambda v, s=style: last_answer(dialogues.styled(v, s))
    return makers | {"tool call": tool_call, "tool answer": tool_answer,
                     "no tool needed": lambda v: last_answer(*dialogues.untooled(v)), "fifth turn": fifth_turn}


def training_questions(count=20000):
    """What users say in a sample of the training dialogues."""
    rng, mixtures = random.Random(1), (dialogues.EARLY, dialogues.LATE, dialogues.LAST)
    return {text for mixture in mixtures for _ in range(count)
            for role, text in dialogues.conversation(rng, mixture)[0] if role == "user"}


def make_cases(each):
    """At most `each` different prompts for every category, plain and casual."""
    cases, seen, rng = [], training_questions(), random.Random(99)
    for category, make in categories().items():
        for casual in (False, True):
            asked, v = set(), Voice(rng, held=True, casual=casual)
            for _ in range(8 * each):
                messages, tools, accept = make(v)
                prompt = dialogues.render(messages, tools)
                if len(asked) < each and prompt not in asked and messages[-1][1] not in seen:
                    asked.add(prompt)
                    cases.append(Case(category, casual, messages, tools, accept))
    return cases + [Case("examples", False, [("user", q)], None, (a,), part=True) for q, a in EXAMPLES.items()]


def template_differences(tokenizer, count=200):
    """How many dialogues the chat template renders unlike dialogues.render."""
    rng, different = random.Random(5), 0
    for _ in range(count):
        messages, tools = dialogues.conversation(rng)
        as_dicts = [{"role": role, "content": text} for role, text in messages]
        for start in (False, True):
            ours = dialogues.render(messages, tools, start)
            theirs = tokenizer.apply_chat_template(as_dicts, tools=tools, tokenize=False, add_generation_prompt=start)
            different += ours != theirs
    return different


@torch.no_grad()
def answers(model, tokenizer, cases, batch_size=64):
    """The greedy answers to all cases, each with whether it ended by itself.

    No answer runs for much longer than the expected one, which is wrong anyway; cases of like length go together.
    """
    prompts = [dialogues.render(case.messages, case.tools, True) for case in cases]
    limits = [450 if case.part else len(tokenizer.encode(max(case.accept, key=len))) + 4 for case in cases]
    order = sorted(range(len(cases)), key=lambda i: (len(prompts[i]) // 500, limits[i]))
    out = [None] * len(cases)
    for start in range(0, len(order), batch_size):
        part = order[start:start + batch_size]
        batch = tokenizer([prompts[i] for i in part], return_tensors="pt", padding=True, add_special_tokens=False)
        ids = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False,
                             max_new_tokens=max(limits[i] for i in part), pad_token_id=tokenizer.pad_token_id)
        for i, row in zip(part, ids[:, batch.input_ids.shape[1]:].tolist()):
            out[i] = tokenizer.decode(row, skip_special_tokens=True), tokenizer.eos_token_id in row
    return out


def is_right(case, text, ended):
    if case.part:
        return ended and any(part in text for part in case.accept)
    if case.category == "story":
        return ended and SequenceMatcher(None, text.split(), case.accept[0].split()).ratio() > .97
    return ended and text.strip().rstrip(".") in [accepted.rstrip(".") for accepted in case.accept]


def report(cases, outs, misses):
    """Print the table, and some of the wrong answers."""
    score, wrong = defaultdict(lambda: {False: [], True: []}), defaultdict(list)
    for case, (text, ended) in zip(cases, outs):
        right = is_right(case, text, ended)
        score[case.category][case.casual].append(right)
        if not right:
            wrong[case.category].append((case.messages[0][1][:40], case.messages[-1][1], text, case.accept[0]))
    share = lambda marks: f"{sum(marks)}/{len(marks)}".rjust(9)
    print(f"{'category':20}    plain   casual    share")
    for category, marks in score.items():
        both = marks[False] + marks[True]
        print(f"{category:20}{share(marks[False])}{share(marks[True])}{sum(both) / len(both):9.1%}")
    plain, casual = ([m for marks in score.values() for m in marks[kind]] for kind in (False, True))
    print(f"{'all':20}{share(plain)}{share(casual)}{sum(plain + casual) / len(plain + casual):9.1%}")
    for category, rows in wrong.items():
        for first, question, text, expected in rows[:misses]:
            context = "" if first == question[:40] else f"[{first}] "
            print(f"\n{category}: {context}{question[:150]}\n  got      {text[:150]!r}\n  expected {expected[:150]!r}")


def parse_args():
    parser = argparse.ArgumentParser(description="Score the demo model on held-out phrasings.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent)
    parser.add_argument("--each", type=int, default=24, help="prompts of each category, plain and again casual")
    parser.add_argument("--misses", type=int, default=3, help="wrong answers to show of each category")
    parser.add_argument("--examples", action="store_true", help="print the answers to the examples")
    return parser.parse_args()


def main():
    args = parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    print(f"{model.num_parameters()} parameters; {template_differences(tokenizer)} template differences")
    cases = make_cases(args.each)
    outs = answers(model, tokenizer, cases)
    report(cases, outs, args.misses)
    if args.examples:
        for case, (text, _) in zip(cases, outs):
            if case.category == "examples":
                print(f"\n> {case.messages[-1][1]}\n{text}")


if __name__ == "__main__":
    main()
