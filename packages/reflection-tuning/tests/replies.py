"""Replies of teachers in all forms that were seen, what is read from them, and what the published rules make of them.

Each: name, reply, ours, published, and the number of the difference that is intended (section 6 of the notes on the
original: 2 bare End, 3 half a pair, 4 placeholders inside texts, 0 a form that the original does not know).
None stands for: the old text stays.
"""

from __future__ import annotations

import json

Pair = tuple[str | None, str | None]
NONE: Pair = (None, None)
_I, _A, _B, _E = "[New Instruction]", "[New Answer]", "[Better Answer]", "[End]"
_JSON = {"criticism": {"ambiguity": "Vague."}, "new_instruction": "Ask X?", "new_answer": "X it is."}
_BETTER = {"criticism": {"accuracy": "Wrong."}, "better_answer": "Y it is."}
PAIR: Pair = ("Ask X?", "X it is.")

INSTRUCTION: list[tuple[str, str, Pair, Pair, int | None]] = [
    ("plain", f"Vague.\n{_I}\nAsk X?\n{_E}\n{_A}\nX it is.\n{_E}", PAIR, PAIR, None),
    ("on one line", f"{_I} Ask X? {_E}\n{_A} X it is. {_E}", PAIR, PAIR, None),
    ("no end of the answer", f"{_I} Ask X? {_E}\n{_A} X it is.", PAIR, PAIR, None),
    ("no end of the instruction", f"{_I} Ask X?\n{_A} X it is.\n{_E}", PAIR, PAIR, None),
    ("no end at all", f"{_I} Ask X?\n{_A} X it is.", PAIR, PAIR, None),
    ("windows", f"{_I}\r\nAsk X?\r\n{_E}\r\n{_A}\r\nX it is.\r\n{_E}", PAIR, PAIR, None),
    ("lower case", "[new instruction]\nAsk X?\n[end]\n[new answer]\nX it is.\n[end]", PAIR, NONE, 0),
    ("bold tags",
     f"**{_I}**\nAsk X?\n**{_E}**\n**{_A}**\nX it is.\n**{_E}**", PAIR, ("**\nAsk X?\n**", "**\nX it is.\n**"), 0),
    ("heading tags", f"## {_I}\nAsk X?\n{_E}\n## {_A}\nX it is.\n{_E}", PAIR, PAIR, None),
    ("tags with a colon", f"{_I}:\nAsk X?\n{_E}\n{_A}:\nX it is.\n{_E}", PAIR, (":\nAsk X?", ":\nX it is."), 0),
    ("underscores", "[New_Instruction]\nAsk X?\n[End]\n[New_Answer]\nX it is.\n[End]", PAIR, NONE, 0),
    ("the form quoted first",
     f"I shall write:\n{_I} your instruction {_E}\n{_A} your answer {_E}\n\n{_I} Ask X? {_E}\n{_A} X it is. {_E}",
     PAIR, NONE, 4),
    ("two tries, the last one counts",
     f"{_I} Ask W? {_E}\n{_A} W. {_E}\n{_I} Ask X? {_E}\n{_A} X it is. {_E}", PAIR, ("Ask W?", "W."), 0),
    ("the tag said in the criticism",
     f"The [New Instruction] must be clear.\n{_I}\nAsk X?\n{_E}\n{_A}\nX it is.\n{_E}", PAIR,
     ("must be clear.\n[New Instruction]\nAsk X?", "X it is."), 0),
    ("no answer", f"{_I} Ask X? {_E}", NONE, ("Ask X?", None), 3),
    ("no instruction", f"{_A} X it is. {_E}", NONE, (None, "X it is."), 3),
    ("an empty answer", f"{_I} Ask X? {_E}\n{_A}\n{_E}", NONE, ("Ask X?", None), 3),
    ("an empty instruction", f"{_I}\n{_E}\n{_A} X it is. {_E}", NONE, (None, "X it is."), 3),
    ("answer first", f"{_A} X it is. {_E}\n{_I} Ask X? {_E}", NONE, PAIR, 0),
    ("N/A in a table", f"{_I} Ask X? {_E}\n{_A}\n| a | N/A |\n{_E}", ("Ask X?", "| a | N/A |"), ("Ask X?", None), 4),
    ("N/A alone", f"{_I} Ask X? {_E}\n{_A} N/A {_E}", NONE, ("Ask X?", None), 3),
    ("your answer in an email", f"{_I} Ask X? {_E}\n{_A} I look forward to your answer. {_E}",
     ("Ask X?", "I look forward to your answer."), ("Ask X?", None), 4),
    ("your instruction in a question", f"{_I} How do I follow your instruction manual? {_E}\n{_A} Read it. {_E}",
     ("How do I follow your instruction manual?", "Read it."), (None, "Read it."), 4),
    ("placeholders", f"{_I} your instruction {_E}\n{_A} your answer {_E}", NONE, NONE, None),
    ("a list number before the answer", f"{_I} Ask X?\n\n3. {_A} X it is. {_E}", PAIR, PAIR, None),
    ("a tag in a fence",
     f"{_I} Ask X? {_E}\n{_A}\n```\n[End]\nx = 1\n```\nDone.\n{_E}", ("Ask X?", "```\n[End]\nx = 1\n```\nDone."),
     ("Ask X?", "```"), 0),
    ("the whole in a fence", f"```\n{_I}\nAsk X?\n{_E}\n{_A}\nX it is.\n{_E}\n```", PAIR, PAIR, None),
    ("words for tags", "New Instruction: Ask X?\nNew Answer: X it is.", NONE, PAIR, 0),
    ("json", json.dumps(_JSON), PAIR, NONE, 0),
    ("json in a fence", f"Here:\n```json\n{json.dumps(_JSON, indent=1)}\n```\nGood luck!", PAIR, NONE, 0),
    ("json after words", f"Sure. {json.dumps(_JSON)} That is all.", PAIR, NONE, 0),
    ("json with half a pair", json.dumps({"new_instruction": "Ask X?"}), NONE, NONE, None),
    ("json with a list for a text", json.dumps({**_JSON, "new_answer": ["X"]}), NONE, NONE, None),
    ("json that is cut", json.dumps(_JSON)[:-5], NONE, NONE, None),
    ("empty", "", NONE, NONE, None),
    ("prose", "I am sorry, I cannot do that.", NONE, NONE, None),
    ("spaces", "  \n\t ", NONE, NONE, None),
]  # fmt: skip

RESPONSE: list[tuple[str, str, str | None, str | None, int | None]] = [
    ("plain", f"Short.\n{_B}\nY it is.\n{_E}", "Y it is.", "Y it is.", None),
    ("no end", f"{_B} Y it is.", "Y it is.", "Y it is.", None),
    ("End users", f"{_B} End users love it. {_E}", "End users love it.", None, 2),
    ("Endocrine", f"{_B} The Endocrine system. {_E}", "The Endocrine system.", "The", 2),
    ("WeekEnd", f"{_B} Every WeekEnd counts. {_E}", "Every WeekEnd counts.", "Every Week", 2),
    ("The End", f"{_B} So it was. The End.\nWait. {_E}", "So it was. The End.\nWait.", "So it was. The", 2),
    ("twice", f"{_B} W. {_E}\n{_B} Y it is. {_E}", "Y it is.", None, 0),
    ("a fence with the tag", f"{_B}\n```\n{_B}\n```\nY it is.\n{_E}", "```\n[Better Answer]\n```\nY it is.", None, 0),
    ("N/A in it", f"{_B} | x | N/A | {_E}", "| x | N/A |", "| x | N/A |", None),
    ("N/A alone", f"{_B} N/A {_E}", None, "N/A", 4),
    ("json", json.dumps(_BETTER), "Y it is.", None, 0),
    ("json in a fence", f"```\n{json.dumps(_BETTER)}\n```", "Y it is.", None, 0),
    ("json, criticism as a text",
     json.dumps({"criticism": "Wrong.", "better_answer": "Y it is."}), "Y it is.", None, 0),
    ("the form of the other stage", f"{_I} Ask X? {_E}\n{_A} Y. {_E}", None, None, None),
    ("empty text", f"{_B}\n{_E}", None, None, None),
    ("empty", "", None, None, None),
]  # fmt: skip
