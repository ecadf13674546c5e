"""Whether teacher and student number their tokens alike."""

from transformers import PreTrainedTokenizerBase

from schemas.errors import TokenizerMismatchError


def check_same_tokenizer(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Check that both tokenizers give every id the same token. Padded embedding tables do not matter.

    Raises:
        TokenizerMismatchError: names the first id whose token differs.
    """
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            raise TokenizerMismatchError(
                f"teacher and student tokenizers differ at id {index}: teacher has {theirs.get(index)!r}, "
                f"student has {ours.get(index)!r}. The teacher scores the student's token ids, so both must share "
                "one tokenizer: choose models of one family"
            )
    probe = "Near-Policy Distillation: 1 + 1 = 2,\n\tnaïve café 你好 🙂"
    if teacher(probe, add_special_tokens=False)["input_ids"] != student(probe, add_special_tokens=False)["input_ids"]:
        raise TokenizerMismatchError(
            "teacher and student share a vocabulary but split the same text differently (merges or normalisation "
            "differ); choose models of one family"
        )
