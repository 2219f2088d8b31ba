"""A judge from its name, or of the caller's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...errors import InputError
from .judge import Judge, _CallableJudge
from .keywords import KeywordJudge, PaperJudge

_FORMS = "keywords, paper, classifier:PATH:LABEL, chat:PATH, a Judge or a callable"


def as_judge(
    judge: str | Judge | Callable,
    *,
    template: str | Path | None = None,
    complied_if: str = "unsafe",
    refused_if: str = "safe",
    dtype: str = "auto",
    device: str | None = None,
    max_new_tokens: int | None = None,
) -> Judge:
    """A Judge of any form.

    judge     "keywords", "paper", "classifier:PATH:LABEL" (LABEL: the model's label that means complied),
              "chat:PATH", a Judge, or a callable: it takes a list of texts, and the prompts as `prompts` if it
              has a parameter of that name, and returns one label or boolean each
    template  for models: the text to judge with {completion}, and {prompt} where the judge should see it; or the
              path of a UTF-8 file with it. Default: the completion alone
    complied_if, refused_if  how the answers of a chat judge begin
    dtype, device            of the model, as load_model takes them
    max_new_tokens           of a chat judge's answer: one that thinks first needs more than the default of 8

    Models are loaded here, so that one that cannot be is told before anything is generated.
    Raises InputError for anything else, and for a model that cannot be loaded.
    """
    kind, colon, rest = judge.partition(":") if isinstance(judge, str) else ("", "", "")
    if kind in ("classifier", "chat") and colon:
        if kind == "classifier" and max_new_tokens is not None:
            raise InputError(
                f"judge {judge!r} writes no tokens: max_new_tokens (--judge-tokens) is for chat judges"
            )
        path, label = (rest.rpartition(":")[::2]) if kind == "classifier" else (rest, None)
        if not path or label == "":
            raise InputError(f"judge {judge!r}: expected classifier:PATH:LABEL or chat:PATH")
        from .model import NEW_TOKENS, ModelJudge, read_template  # imports torch and transformers

        text = "{completion}" if template is None else read_template(template)
        return ModelJudge(
            path, kind, complied_label=label, template=text, complied_if=complied_if, refused_if=refused_if,
            max_new_tokens=NEW_TOKENS if max_new_tokens is None else max_new_tokens, dtype=dtype, device=device,
        )  # fmt: skip
    if template is not None:
        raise InputError(f"judge {_shown(judge)} takes no template: only classifier and chat judges do")
    if max_new_tokens is not None:
        raise InputError(
            f"judge {_shown(judge)} writes no tokens: max_new_tokens (--judge-tokens) is for chat judges"
        )
    if isinstance(judge, Judge):
        return judge
    if isinstance(judge, str):
        plain = {"keywords": KeywordJudge, "paper": PaperJudge}
        if judge not in plain:
            raise InputError(f"unknown judge {judge!r}: expected {_FORMS}")
        return plain[judge]()
    if isinstance(judge, type):
        raise InputError(f"judge {judge.__name__} is a class: give an object of it, {judge.__name__}(...)")
    if not callable(judge):
        raise InputError(f"unknown judge {judge!r}: expected {_FORMS}")
    return _CallableJudge(judge)


def _shown(judge) -> str:
    return repr(judge) if isinstance(judge, str) else getattr(judge, "name", type(judge).__name__)
