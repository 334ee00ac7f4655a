"""Sum up the history of a run in plain sentences: do captions matter, does it overfit, does it copy.

A "valid" loss is of the averaged weights, which best.pt has. A "train" loss is the mean over an epoch, in which weights
change and conditions are dropped. So only a "valid" loss that rises and lies above the "train" loss shows overfitting.
"""

import math

from dataprep.shards import MIN_HELD_OUT

RISE = 0.02  # nats; a smaller rise of the validation loss may be chance


def lines_of_stage(history, stage):
    return [line for line in history if line.get("stage") == stage]


def sum_up_conditions(valid, conditions):
    """Sum up the gain of a "valid" line, which counts if it exceeds two standard errors. conditions: "captions" ..."""
    gain, error, where = valid["gain"], valid.get("gain_se"), f"(on held-out music, at step {valid['step']:,})"
    if error is None:  # one track, or a run of an older version
        return f"With {conditions}, the validation loss is {gain:.3f} nats lower than without {where}."
    where = f"(standard error over {valid['tracks']} held-out tracks, at step {valid['step']:,})"
    number, name = f"{gain:.3f} ± {error:.3f}", conditions.capitalize()
    if gain > 2 * error:
        return f"{name} matter: they lower the validation loss by {number} nats {where}."
    if gain < -2 * error:
        return f"{name} harm: they raise the validation loss by {-gain:.3f} ± {error:.3f} nats {where}."
    return f"No sign that {conditions} matter: they lower the validation loss by {number} nats {where}."


def sum_up_losses(valid, train_ce):
    """Sum up whether the model overfits, from the "valid" lines and the newest epoch's training loss."""
    best, last = min(valid, key=lambda line: line["ce"]), valid[-1]["ce"]
    rise = f"the validation loss has risen from {best['ce']:.3f} to {last:.3f} nats"
    if last <= best["ce"] + RISE:
        return (f"No overfitting: the validation loss, {last:.3f} nats, is within {RISE} of its lowest value; the"
                f" training loss is {train_ce:.3f}.")  # fmt: skip
    if train_ce < last:
        return f"Overfitting since step {best['step']:,}: {rise}, while the training loss is down to {train_ce:.3f}."
    return (f"No overfitting, but since step {best['step']:,} {rise}. The training loss, {train_ce:.3f}, is not lower;"
            " try a lower --lr.")  # fmt: skip


def sum_up_copying(line):
    """Sum up the shares of copies in an "evaluate" line. A difference counts if it exceeds two standard errors."""
    copied, real, clips = line["copied"], line["copied_real"], line["clips"]
    p = (copied + real) / 2
    verdict = "No sign of copying" if copied <= real else "No clear sign of copying"
    if copied - real > 2 * math.sqrt(2 * p * (1 - p) / clips):
        verdict = "Copying"
    verdict = verdict if clips >= MIN_HELD_OUT else "Too few clips to judge copying"
    return (f"{verdict}: {100 * copied:.0f} % of the {clips} generated clips repeat 4 s of training music nearly code"
            f" for code; {100 * real:.0f} % of held-out clips do.")  # fmt: skip


def summarize(history, conditions="captions"):
    """Return sentences about a run from the lines of its history, as far as they have the numbers."""
    valid, train = ([line for line in lines_of_stage(history, stage) if math.isfinite(line["ce"])]
                    for stage in ("valid", "train"))  # fmt: skip
    sentences, with_gain = [], [line for line in valid if line["step"] and line.get("gain")]  # 0 without captions
    if with_gain:
        sentences.append(sum_up_conditions(min(with_gain, key=lambda line: line["ce"]), conditions))
    if train and valid:
        sentences.append(sum_up_losses(valid, train[-1]["ce"]))
    for line in lines_of_stage(history, "evaluate")[-1:]:
        sentences += [sum_up_copying(line)] if line.get("copied") is not None else []
        sentences += [line["withheld"]] if line.get("withheld") else []
    return sentences
