"""Scores one line with the functions of `phi3 evaluate`; a failed line scores nothing."""

from metrics import exact_match, rouge_l, token_f1
from promptflow.core import tool
from promptflow_fixes import refuse_what_lacks_a_question

NO_ANSWER = "no answer"

# Else Prompt flow reads a null as the text "None", and a key that other rows have as "nan".
refuse_what_lacks_a_question()


@tool
def score_line(
    expected: str,
    answer: str = "",
    error: str = "",
    seconds: float = -1.0,
    line_number: int = -1,
) -> dict:
    if not (isinstance(expected, str) and expected.strip()):
        raise ValueError(
            "The input 'expected' is null or empty: without it nothing can be scored. Map its "
            "column with --column-mapping expected='${data.COLUMN}'"
        )
    if not (isinstance(error, str) and error):
        error = "" if isinstance(answer, str) and answer.strip() else NO_ANSWER
    return {
        "line_number": line_number,
        "error": error,
        "seconds": seconds if isinstance(seconds, (int, float)) and seconds >= 0 else None,
        "exact_match": 0.0 if error else float(exact_match(answer, expected)),
        "token_f1": 0.0 if error else token_f1(answer, expected),
        "rouge_l": 0.0 if error else rouge_l(answer, expected),
    }
