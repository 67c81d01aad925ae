"""The rules by which the published scripts read replies, from their description: what ours is compared with."""

from __future__ import annotations

import re


def instruction_reply(text: str) -> tuple[str | None, str | None]:
    """(instruction, answer); None where the old one stays."""
    tag = r"\[New Instruction\]" if "[New Instruction]" in text else "New Instruction:"
    found = re.search(rf"{tag}(.*?)(?=\[End\]|\[New Answer\]|New Answer:|\Z)", text, re.DOTALL)
    instruction = re.sub(r"\n\s*\n\s*3\.\s*\Z", "", found[1]).strip() if found else ""
    tag = r"\[New Answer\]" if "[New Answer]" in text else "New Answer:"
    found = re.search(rf"{tag}(.*?)(?=\[End\]|\Z)", text, re.DOTALL)
    answer = found[1].strip() if found else ""
    kept = instruction if instruction and "your instruction" not in instruction else None
    return kept, answer if answer and "N/A" not in answer and "your answer" not in answer else None


def response_reply(text: str) -> str | None:
    """The better answer; None where the old one stays."""
    tag = r"\[Better Answer\]"
    several = len(re.findall(tag, text)) >= 2
    end = r"\[End\]|\[Better Answer\]|\Z" if several else r"\[End\]|End|\Z"
    found = re.findall(rf"{tag}(.*?)(?={end})", text, re.DOTALL)
    return found[0].strip() or None if len(found) == 1 else None
