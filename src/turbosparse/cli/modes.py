"""What the modes that watch themselves say: mode lossless of its drafts, predicted mode of its audit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbosparse.cli import output
from turbosparse.cli.options import Mode

if TYPE_CHECKING:
    from turbosparse.engine import Session

_PREDICTING = (Mode.predicted, Mode.auto_predicted)


def begin(session: Session, mode: Mode, audit: float, seed: int) -> None:
    """Begin the audit of a session, where its mode predicts.

    Raises:
        UserError: `audit` is no share.
    """
    if mode in _PREDICTING:
        session.audit(audit, seed)


def record(session: Session, mode: Mode) -> dict[str, Any]:
    """The objects `lossless` and `audit` of the JSON; None in other modes."""
    return {
        "lossless": session.drafting.to_json() if mode is Mode.lossless else None,
        "audit": session.audit_report.to_json() if mode in _PREDICTING else None,
    }


def lines(record: dict[str, Any]) -> list[str]:
    """The same in words: what there is to say at the end of a run, the moves of thresholds first."""
    said = []
    if record["audit"] is not None:
        said += [move_line(move, record["audit"]["promised"][move["layer"]]) for move in record["audit"]["moves"]]
        said.append(audit_line(record["audit"]))
    if record["lossless"] is not None:
        said.append(drafting_line(record["lossless"]))
    return said


def drafting_line(drafting: dict[str, Any]) -> str:
    """From `Drafting.to_json`."""
    return (
        f"lossless: {output.number(drafting['tokens_per_verification'], 2)} tokens a verification, "
        f"{output.percent(drafting['acceptance'])} of the drafts accepted"
    )


def audit_line(audit: dict[str, Any]) -> str:
    """From `AuditReport.to_json`."""
    if audit["tokens"] == 0:
        return f"audit: none of these tokens was among the {output.percent(audit['share'])} that are audited"
    half = {name: (audit[name]["high"] or 0) - (audit[name]["mean"] or 0) for name in ("recall", "kept", "kl")}
    alone = audit["tokens"] < 2  # no interval
    shown = {name: "" if alone else f" ± {100 * half[name]:.1f}" for name in ("recall", "kept")}
    kl = f"{audit['kl']['mean']:.4f}" + ("" if alone else f" ± {half['kl']:.4f}")
    return (
        f"audit of {audit['tokens']} tokens: {100 * audit['recall']['mean']:.1f}{shown['recall']} % of the firing "
        f"neurons found, {100 * audit['kept']['mean']:.1f}{shown['kept']} % of |h| kept, KL {kl} nats"
    )


def move_line(move: dict[str, Any], promised: float) -> str:
    """That the thresholds of a layer were moved."""
    direction = "lowered" if move["by"] < 0 else "raised"
    return (
        f"audit: layer {move['layer']} kept {output.percent(move['kept'])} of |h|, not the {output.percent(promised)} "
        f"promised; its threshold is {direction} by {abs(move['by']):.3g} from position {move['position']} on"
    )
