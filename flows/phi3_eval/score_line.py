"""Scores one line with the functions of `phi3 evaluate`; a failed line scores nothing."""

from metrics import exact_match, rouge_l, token_f1
from promptflow.core import tool


@tool
def score_line(
    answer: str = "",
    expected: str = "",
    error: str = "",
    seconds: float = -1.0,
    line_number: int = -1,
) -> dict:
    # Prompt flow reads an empty cell of the data as None or as NaN, which is like no number.
    failed = isinstance(error, str) and bool(error)
    return {
        "line_number": line_number,
        "error": error if failed else "",
        "seconds": seconds if isinstance(seconds, (int, float)) and seconds >= 0 else None,
        "exact_match": 0.0 if failed else float(exact_match(answer, expected)),
        "token_f1": 0.0 if failed else token_f1(answer, expected),
        "rouge_l": 0.0 if failed else rouge_l(answer, expected),
    }
