"""What training brings on the demo's model: agreement with dense before and after, on pages that it was not trained on.

    python benchmarks/train_demo.py DIR [--json]

Builds the demo's checkpoint, prints bulletins with invented names and numbers, trains on questions about them, and
measures how often the most likely next token is that of dense attention along the right answers about other bulletins.
Interrupted, the same command goes on with the training; `training_cpu_s` then counts the last part alone.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import transformers
from gap import Gap, write_conversations

import gazepatch
from gazepatch.demo.checkpoint import SIDE, build
from gazepatch.demo.glyphs import print_page

FIRST = "Ruth|Tomas|Amara|Jack|Helen|Daniel|Sam|Elena|Ivan|Grace|Omar|Lucy|Peter|Nina|Hugo|Clara"
LAST = "Okafor|Lindqvist|Diallo|Penrose|Brandt|Reyes|Whitlock|Vasquez|Novak|Marsh|Keller|Aziz|Holm|Byrne"
PLACES = "Station Square|Mill Lane|Chapel Street|the old quay|the town hall|Bridge Road|the church yard|Park Avenue"
THINGS = "apple trees|rose bushes|cherry trees|tulips|oak trees|sunflowers|pear trees|lavender bushes"
SHIPS = "Morning Star|Sea Swallow|Blue Heron|Lady Margaret|North Wind|Golden Hind|Silver Tern|Queen Ada"
CATS = "Pepper|Biscuit|Luna|Smokey|Ginger|Misty|Felix|Poppy"
COLOURS = "blue|green|red|white|yellow|black|grey|brown"
DAYS = "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday"
WARES = "postcards|maps|honey|bread|cheese|candles|toys|stamps|soap|wool"

# A notice of the bulletin, with questions about it and their answers. Slots are filled alike in all of them.
NOTICES = (
    (
        "FERRY. The winter timetable starts on {day}. The first boat leaves at {hour}:15 in the morning. A return "
        "ticket costs {n} pounds and bicycles travel free. The ferry is called the {ship} and her captain is {name}.",
        ("What is the ferry called?", "The ferry is called the {ship}."),
        ("Who is the captain of the ferry?", "The captain of the ferry is {name}."),
        ("How much does a return ticket cost?", "A return ticket costs {n} pounds."),
    ),
    (
        "LIBRARY. The library in {place} is closed for repairs until {date} November, because the roof leaks. The "
        "librarian, {name}, asks readers to keep their books until then. No fines will be charged.",
        ("Who is the librarian?", "The librarian is {name}."),
        ("Until when is the library closed?", "The library is closed until {date} November."),
    ),
    (
        "SCHOOL. The children of the primary school have planted {m} {thing} on the hill behind the church. The head "
        "teacher, {name}, thanked everyone who helped. The school play takes place on {day}.",
        ("What did the children plant?", "The children planted {m} {thing}."),
        ("Who is the head teacher?", "The head teacher is {name}."),
    ),
    (
        "MARKET. The fish market moves to {place}. It opens on {day} from {hour} in the morning until noon. {ware} and "
        "{ware2} are sold there as well. Dogs must be kept on a lead.",
        ("Where does the fish market move to?", "The fish market moves to {place}."),
        ("When does the fish market open?", "The fish market opens on {day} from {hour} in the morning until noon."),
    ),
    (
        "WEATHER. A storm is expected on {day} night with winds of {m} kilometres an hour. Boat owners should double "
        "their ropes. The harbour master, {name}, can be reached by telephone at 555 0{m}.",
        ("When is a storm expected?", "A storm is expected on {day} night."),
        ("Who is the harbour master?", "The harbour master is {name}."),
    ),
    (
        "LOST AND FOUND. A {colour} cat was lost near the lighthouse on {day}. Her name is {cat}. Please call {name} "
        "at the post office. A silver watch was found on the beach; the owner can collect it at the police station.",
        ("What is the name of the lost cat?", "The name of the lost cat is {cat}."),
        ("What colour is the lost cat?", "The lost cat is {colour}."),
    ),
    (
        "MUSIC. The brass band plays in the park on {day} afternoon. The conductor is {name}, who also teaches the "
        "trumpet. If it rains, the concert takes place in {place}. Admission is free, and tea will be served.",
        ("Who is the conductor of the brass band?", "The conductor of the brass band is {name}."),
        ("Where does the concert take place if it rains?", "If it rains, the concert takes place in {place}."),
    ),
    (
        "FOOTBALL. Port Alder won the match on {day} by {n} goals to one. The last goal was scored by {name} with a "
        "kick from the far side. The next match is away, on {date} October.",
        ("Who scored the last goal?", "The last goal was scored by {name}."),
        ("When is the next match?", "The next match is on {date} October."),
    ),
    (
        "HEALTH. Doctor {name} gives vaccinations against influenza at the health centre every {day} afternoon. People "
        "over {m} pay nothing. The pharmacy stays open until {hour} in the evening this week.",
        ("Which doctor gives vaccinations?", "Doctor {name} gives vaccinations."),
        ("When are vaccinations given?", "Vaccinations are given every {day} afternoon."),
    ),
    (
        "MUSEUM. The lifeboat museum has a new exhibit: the brass bell of the steamer {ship}, which was raised by "
        "divers last summer. Children may ring it at noon. The museum shop sells {ware} and {ware2}.",
        ("What does the museum shop sell?", "The museum shop sells {ware} and {ware2}."),
        ("Which ship does the brass bell come from?", "The brass bell comes from the steamer {ship}."),
    ),
    (
        "FOR SALE. A wooden rowing boat, {n} metres long, painted {colour}, with two oars, {m} pounds. An upright "
        "piano in good condition. Ask for {name} at the hardware shop in {place}.",
        ("What colour is the rowing boat?", "The rowing boat is painted {colour}."),
        ("How much does the rowing boat cost?", "The rowing boat costs {m} pounds."),
    ),
    (
        "THANKS. The crew of the lifeboat thank everyone who came to the harbour fair on {day}. It raised {m} pounds "
        "for a new engine. The prize of the raffle was won by {name}.",
        ("How much did the harbour fair raise?", "The harbour fair raised {m} pounds."),
        ("Who won the prize of the raffle?", "The prize of the raffle was won by {name}."),
    ),
)
HEAD = "THE HARBOUR BULLETIN\nNews and notices for the people of Port Alder.\n\n"
TASK = "Read this page, then answer a question.\n\n<image>\n\n"


def bulletin(rng: random.Random, questions: int) -> tuple[str, list[tuple[str, str]]]:
    """The text of a bulletin, and questions about it with their answers."""

    def pick(words: str) -> str:
        return rng.choice(words.split("|"))

    notices, asked = [], []
    for text, *pairs in rng.sample(NOTICES, len(NOTICES)):
        ware, ware2 = rng.sample(WARES.split("|"), 2)
        slots = {
            "day": pick(DAYS),
            "hour": rng.randint(6, 9),
            "n": rng.randint(2, 9),
            "m": rng.randint(66, 999),
            "date": rng.randint(2, 29),
            "name": f"{pick(FIRST)} {pick(LAST)}",
            "place": pick(PLACES),
            "thing": pick(THINGS),
            "ship": pick(SHIPS),
            "cat": pick(CATS),
            "colour": pick(COLOURS),
            "ware": ware,
            "ware2": ware2,
        }
        notices.append(text.format(**slots))
        asked += [(question, answer.format(**slots)) for question, answer in pairs]
    return HEAD + "\n\n".join(notices), rng.sample(asked, questions)


def write_records(folder: Path, name: str, processor: Any, pages: int, questions: int, seed: int) -> Path:
    """Pages as images, and a file of conversations about them."""
    rng, encode = random.Random(seed), processor.tokenizer.encode
    (blank,) = encode("\n", add_special_tokens=False)
    (folder / name).mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(pages):
        text, pairs = bulletin(rng, questions)
        page = encode(text, add_special_tokens=False)[: SIDE * SIDE]
        print_page(page, SIDE, blank).save(folder / name / f"{number}.png")
        messages = []
        for turn, (question, answer) in enumerate(pairs):
            messages.append({"role": "user", "content": question if turn else TASK + question})
            messages.append({"role": "assistant", "content": answer})
        records.append({"messages": messages, "images": [f"{name}/{number}.png"]})
    return write_conversations(folder, name, records)


def main() -> None:
    """Parse the command line, train and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for the checkpoint, the pages and the artefact")
    parser.add_argument("--pages", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--questions", type=int, default=12, help="of each page, in one conversation")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--context-tokens", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--schedule", type=float, default=0.25)
    parser.add_argument("--trainable", default="context")
    parser.add_argument("--out", default="artefact", help="name of the artefact's folder inside DIR")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    base = args.folder / "reader"
    if not (base / "processor_config.json").is_file():
        build(base)
    processor = transformers.AutoProcessor.from_pretrained(base)
    data = write_records(args.folder, "pages", processor, args.pages, args.questions, seed=1)
    held_out = write_records(args.folder, "held-out", processor, args.held_out, args.questions, seed=2)
    # The stand-in reads line by line, so regions are stretches of a line: see gazepatch/demo/run.py.
    config = gazepatch.GazeConfig.paper(
        region=(1, 16, 1), window=(1, 4, 1), budget=args.budget, context_tokens=args.context_tokens
    )
    gap = Gap(args, processor, held_out)
    gap.measure_untrained(transformers.AutoModelForImageTextToText.from_pretrained(base), config)
    with gap.training():
        out = gazepatch.train(
            base,
            data,
            args.folder / args.out,
            config=config,
            trainable=args.trainable,
            batch_size=args.batch_size,
            epochs=args.epochs,
            learning_rate=args.learning_rate,
            schedule=args.schedule,
            save_every=4,
            log_every=4,
            force=True,
        )
    gap.close(gazepatch.load(out))


if __name__ == "__main__":
    main()
