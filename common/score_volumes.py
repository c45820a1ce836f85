"""Scores for NIfTI volumes that anybody made, with this project or with another one.

    python -m common.evaluation --truth FOLDER --predicted FOLDER [--mask FOLDER]
                                [--range LOW,HIGH] [--csv FILE]

Volumes are compared in the unit of their files. The range is the width of the intensity scale, and
it must be the same for all volumes. Every volume x becomes (x - LOW) / (HIGH - LOW) before it is
scored, so MAE and NMSE are in units of the range. Nothing is clipped.

psnr    from one mean squared error over all voxels of the volume, in dB
ssim    the mean of the axial slices that are not empty; an empty slice of the truth has one value
mae     the mean over all voxels
nmse    the squared error, divided by the sum of the squared truth

With a mask, only the voxels count where the mask is above 0.
"""
import argparse
import csv
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
from common import metrics
from common.cli import list_of
from common.files import RunError, replace
from data.files import is_nifti
from data.layouts.people import names_of, person_of, places_of
from data.volumes import same_grid, upright

NUMBERS = ("psnr", "ssim", "mae", "nmse")
# Words that programs add to the name of a volume that they made, and to the name of a mask.
MADE_WORDS = ("synthetic", "synthesized", "synthesised", "synth", "predicted", "prediction", "pred",
              "generated", "fake", "output", "recon")
MASK_WORDS = ("mask", "brainmask", "label", "labels", "seg")
SMALLEST_SHARE = 0.01       # a prediction that fills less of the range is probably in another unit
LISTED = 10                 # so many files without a partner are named in each folder


# ---- which files belong together -----------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two files of one volume, and the mask that goes with them."""

    name: str                       # the path of the truth in its folder, without its ending
    subject: str                    # what its folders tell, or the name if there are none
    truth: Path
    predicted: Path
    mask: Path | None = None


def find_volumes(folder):
    """All NIfTI files in a folder and in the folders below it, as a sorted list of paths.

    RunError if there is no such folder, or if it holds no NIfTI file.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder; give the folder that holds the volumes")
    found = sorted(path for path in folder.rglob("*") if path.is_file() and is_nifti(path))
    if not found:
        raise RunError(f"{folder} holds no .nii or .nii.gz file; give the folder with the volumes")
    return found


def bare_name(path):
    """The name of a NIfTI file without its ending, in lower case."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name.casefold())


def without_suffix(name, words):
    """A bare name without one of these words at its end: "s1_t1_synthetic" -> "s1_t1"."""
    return re.sub(rf"[_.-]({'|'.join(words)})$", "", name)


def match(truths, others, truth_folder, other_folder, words):
    """Find the truth that each other file belongs to -> {truth: other file}.

    Two files belong together if their names are equal and their folders agree. Names may differ in
    one of `words` at the end of the other file's name. Folders agree if both files have the same
    path below their own root, or if the first folder of one path stands on the other path. A file
    that has no folder of its own also agrees with any folder, if its name occurs only once there.
    RunError if two files claim one truth, or if one file could belong to several truths.
    """
    by_name = {}
    for truth in truths:
        by_name.setdefault(bare_name(truth), []).append(truth)
    found = {}
    for other in others:
        folders = other.relative_to(other_folder).parent.parts
        partner = None
        for name in (bare_name(other), without_suffix(bare_name(other), words)):
            if partner is None:
                partner = _partner(by_name.get(name, []), folders, truth_folder, other)
        if partner in found:
            raise RunError(f"{found[partner]} and {other} both belong to {partner}; "
                           "move one of them away")
        if partner is not None:
            found[partner] = other
    return found


def _partner(candidates, folders, truth_folder, other):
    """The one of these truths, all of the right name, whose folders agree; None if none does."""
    related = []
    for truth in candidates:
        ours = truth.relative_to(truth_folder).parent.parts
        if ours == folders:
            return truth
        one_is_flat = not ours or not folders
        if one_is_flat or ours[0] in folders or folders[0] in ours:
            related.append(truth)
    if len(related) > 1:
        raise RunError(f"{other} could belong to {related[0]} or to {related[1]}; "
                       "put it into a folder of the same name as the truth's")
    return related[0] if related else None


def find_pairs(truth_folder, predicted_folder, mask_folder=None):
    """Pair the volumes of two folders -> (pairs, truths without partner, predictions without one).

    The pairs are a list of Pair, and the other two are lists of paths. See `match` for the rules.
    RunError if a folder holds no volumes, if there is no pair, if a pair has no mask, or if it is
    not clear which files belong together.
    """
    if truth_folder.resolve() == predicted_folder.resolve():
        raise RunError("--truth and --predicted are the same folder; give two", status=2)
    truths = find_volumes(truth_folder)
    predicted = find_volumes(predicted_folder)
    matched = match(truths, predicted, truth_folder, predicted_folder, MADE_WORDS)
    if not matched:
        raise RunError(f"no file in {predicted_folder} has the name of a file in {truth_folder} "
                       f"(for example {predicted[0].name} and {truths[0].name}); rename them alike")
    masks = {}
    if mask_folder is not None:
        masks = match(list(matched), find_volumes(mask_folder), truth_folder, mask_folder,
                      MASK_WORDS)
    places = places_of(truth_folder, truths)
    folders = names_of(truth_folder, places)
    subjects = {}
    for place, files in places.items():
        name = folders[place]
        if place != truth_folder:
            subjects.update(dict.fromkeys(files, person_of(name) if "/" in name else name))
    pairs = []
    for truth in truths:
        if truth not in matched:
            continue
        if mask_folder is not None and truth not in masks:
            raise RunError(f"{mask_folder} holds no mask for {truth}; a mask has the name of the "
                           "truth")
        inside = truth.relative_to(truth_folder)
        name = re.sub(r"\.nii(\.gz)?$", "", inside.as_posix(), flags=re.IGNORECASE)
        subject = subjects.get(truth, name)
        pairs.append(Pair(name, subject, truth, matched[truth], masks.get(truth)))
    lonely_truths = [truth for truth in truths if truth not in matched]
    used = set(matched.values())
    lonely_predictions = [path for path in predicted if path not in used]
    return pairs, lonely_truths, lonely_predictions


# ---- numbers -------------------------------------------------------------------------------------


def score_volume(truth, predicted, value_range=(0, 1), mask=None):
    """The numbers of one volume -> {"psnr", "ssim", "mae", "nmse"}, each a float.

    truth, predicted: axial slices (Z, H, W), in one unit.
    value_range: (low, high), the ends of the intensity scale in that unit.
    mask: (Z, H, W) bool, or None for all voxels.

    PSNR is in dB, and inf if the volumes are identical. MAE is in units of the range. SSIM is NaN
    if no slice counts, and NMSE is NaN if the truth is zero everywhere.
    ValueError if the shapes differ, if a voxel is not finite, if a slice has fewer than 11 pixels
    on a side, or if the mask is empty.
    """
    low, high = value_range
    truth = (np.asarray(truth, np.float64) - low) / (high - low)
    predicted = (np.asarray(predicted, np.float64) - low) / (high - low)
    if truth.ndim != 3 or truth.shape != predicted.shape:
        raise ValueError(f"the truth is {truth.shape}, the prediction {predicted.shape}; both must "
                         "be (Z, H, W) of one shape")
    if mask is None:
        counts = truth.max((1, 2)) > truth.min((1, 2))                      # (Z,)
        part = None
        flat_mask = None
    else:
        mask = np.asarray(mask, bool)
        if mask.shape != truth.shape or not mask.any():
            raise ValueError(f"the mask is empty, or is {mask.shape} and not {truth.shape}")
        counts = mask.any((1, 2))                                           # (Z,)
        part = mask[counts]
        flat_mask = mask.reshape(-1, mask.shape[2])
    # One image of all slices below each other has the mean error of the whole volume.
    flat_truth = truth.reshape(-1, truth.shape[2])                          # (Z * H, W)
    flat_predicted = predicted.reshape(-1, truth.shape[2])
    similarity = metrics.ssim(truth[counts], predicted[counts], 1, mask=part)
    similarity = similarity[np.isfinite(similarity)]
    return {"psnr": float(metrics.psnr(flat_truth, flat_predicted, 1, flat_mask)),
            "ssim": float(similarity.mean()) if similarity.size else float("nan"),
            "mae": float(metrics.mae(flat_truth, flat_predicted, flat_mask)),
            "nmse": float(metrics.nmse(flat_truth, flat_predicted, flat_mask))}


def score_files(truth_path, predicted_path, mask_path=None, value_range=None, say=print):
    """The numbers of one pair of NIfTI files; see score_volume.

    value_range: (low, high) in the unit of the files. None stands for (0, 1), and the truth must
    then lie in [0,1].
    say: a function that gets a line about everything that is odd but no error.
    RunError if the grids differ or if the range is missing. data.DataError if a file is unreadable.
    """
    truth = data.read_volume(truth_path)
    predicted = data.read_volume(predicted_path)
    check_grid(predicted, truth)
    if value_range is None:
        check_unit_range(truth)
        value_range = (0, 1)
    mask = None
    if mask_path is not None:
        labels = data.read_volume(mask_path)
        check_grid(labels, truth)
        mask = upright(labels.array) > 0
    for volume in (truth, predicted):
        for note in volume.notes:
            if "NaN" in note:
                say(f"notice: {volume.path} {note}")
    low, high = value_range
    for what, volume in (("truth", truth), ("prediction", predicted)):
        outside = (volume.array < low) | (volume.array > high)
        if outside.mean() > metrics.ROUNDING:
            say(f"notice: {volume.path}: {outside.mean():.1%} of the voxels of the {what} lie "
                f"outside the range {low:g} to {high:g}; they count as they are")
    if np.ptp(predicted.array) < SMALLEST_SHARE * min(high - low, np.ptp(truth.array)):
        say(f"notice: {predicted.path} has values from {predicted.array.min():g} to "
            f"{predicted.array.max():g}, the truth from {truth.array.min():g} to "
            f"{truth.array.max():g}; see if both have the same unit")
    try:
        return score_volume(upright(truth.array), upright(predicted.array), value_range, mask)
    except ValueError as error:
        raise RunError(f"{predicted_path}: {error}") from error


def check_grid(volume, truth):
    """RunError if a data.Volume does not lie on the grid of the truth; the message says why."""
    if same_grid(volume, truth):
        return
    if volume.array.shape != truth.array.shape:
        why = f"the shape {volume.array.shape} where {truth.path} has {truth.array.shape}"
    else:
        gap = np.abs(volume.affine - truth.affine).max()
        why = f"another affine than {truth.path} (entries differ by up to {gap:.3g} mm)"
    raise RunError(f"{volume.path} has {why}; resample it onto the grid of the truth, "
                   "or correct its header if only that is wrong")


def check_unit_range(truth):
    """RunError if the data.Volume of a truth does not lie in [0,1]; --range is then needed."""
    low = float(truth.array.min())
    high = float(truth.array.max())
    if low < -metrics.ROUNDING or high > 1 + metrics.ROUNDING:
        raise RunError(f"--range LOW,HIGH is missing: {truth.path} has values from {low:g} to "
                       f"{high:g}, outside [0,1]; give one scale for all volumes", status=2)


def score_volumes(truth_paths, predicted_paths, mask_paths=None, value_range=None, say=print):
    """The numbers of many pairs of files: a list of dicts as of score_files, in the same order.

    truth_paths, predicted_paths, mask_paths: lists of one length; no mask_paths means no masks.
    value_range, say, and the errors: as of score_files. ValueError if the lengths differ.
    """
    if mask_paths is None:
        mask_paths = [None] * len(truth_paths)
    if not len(truth_paths) == len(predicted_paths) == len(mask_paths):
        raise ValueError(f"score_volumes: {len(truth_paths)} truths, {len(predicted_paths)} "
                         f"predictions, {len(mask_paths)} masks; give as many of each")
    scores = []
    for truth, predicted, mask in zip(truth_paths, predicted_paths, mask_paths):
        scores.append(score_files(truth, predicted, mask, value_range, say))
    return scores


# ---- tables --------------------------------------------------------------------------------------


def table(pairs, scores):
    """The Markdown table for people: one line per volume, then mean ± std over subjects.

    pairs: a list of Pair. scores: their numbers, in the same order.
    A subject with several volumes counts once, with the mean of them. Values that are infinite or
    undefined are shown, but they are in no mean.
    """
    lines = ["| volume | PSNR (dB) | SSIM | MAE | NMSE |", "| --- | --- | --- | --- | --- |"]
    for pair, numbers in zip(pairs, scores):
        lines.append(f"| {pair.name} | {numbers['psnr']:.2f} | {numbers['ssim']:.4f} | "
                     f"{numbers['mae']:.4f} | {numbers['nmse']:.4f} |")
    subjects = [pair.subject for pair in pairs]
    cells = []
    left_out = []
    for metric in NUMBERS:
        values = [numbers[metric] for numbers in scores]
        found = metrics.summary(metrics.per_subject(values, subjects))
        digits = 2 if metric == "psnr" else 4
        if found["n"] == 0:
            cells.append("–")
        elif found["n"] == 1:
            cells.append(f"{found['mean']:.{digits}f}")
        else:
            cells.append(f"{found['mean']:.{digits}f} ± {found['std']:.{digits}f}")
        missing = len(values) - int(np.isfinite(values).sum())
        if missing:
            left_out.append(f"{missing} of {metric.upper()}")
    count = len(set(subjects))
    lines.append(f"| **mean ± std over subjects (n = {count})** | " + " | ".join(cells) + " |")
    if left_out:
        lines.append("")
        lines.append("Infinite (identical volumes) or undefined, and in no mean: "
                     f"{', '.join(left_out)}.")
    return "\n".join(lines)


def as_csv(pairs, scores, value_range):
    """The same numbers for spreadsheets, as text: one line per volume, all digits."""
    columns = ["subject", "volume", *NUMBERS, "range_low", "range_high", "truth", "predicted",
               "mask"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    low, high = value_range
    for pair, numbers in zip(pairs, scores):
        writer.writerow({"subject": pair.subject, "volume": pair.name, **numbers,
                         "range_low": low, "range_high": high, "truth": pair.truth,
                         "predicted": pair.predicted, "mask": pair.mask or ""})
    return text.getvalue()


# ---- the command ---------------------------------------------------------------------------------


def parse(argv=None):
    """The flags of `python -m common.evaluation`. SystemExit with status 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m common.evaluation", allow_abbrev=False,
        description="Score NIfTI volumes that anybody made against true ones. Files pair by name.")
    parser.add_argument("--truth", type=Path, required=True, help="folder with the true volumes")
    parser.add_argument("--predicted", type=Path, required=True,
                        help="folder with the volumes to score; names as in --truth, or with a "
                             "word such as _synthetic behind them")
    parser.add_argument("--mask", type=Path,
                        help="folder with masks of the same names; only voxels above 0 count")
    parser.add_argument("--range", type=list_of(float), metavar="LOW,HIGH", dest="value_range",
                        help="ends of the intensity scale, in the unit of the files "
                             "[0,1 if all true volumes lie in it]")
    parser.add_argument("--csv", type=Path, help="also write the numbers of every volume here")
    args = parser.parse_args(_join_range(argv))
    if args.value_range is not None:
        good = len(args.value_range) == 2 and np.isfinite(args.value_range).all()
        if not good or args.value_range[0] >= args.value_range[1]:
            parser.error("--range needs two numbers, the smaller one first, such as 0,1 "
                         "or -1000,2000")
    return args


def _join_range(argv):
    """Join "--range" and the next word, because argparse takes "-1000,2000" for a flag."""
    if argv is None:
        argv = sys.argv[1:]
    joined = []
    for word in argv:
        if joined and joined[-1] == "--range":
            joined[-1] = f"--range={word}"
        else:
            joined.append(word)
    return joined


def main(argv=None):
    """Score the volumes of two folders. argv: the words of the command line, by default sys.argv.

    RunError or data.DataError for what the user can mend, SystemExit for wrong usage.
    """
    args = parse(argv)
    # These are checked first, because scoring can take long.
    if args.csv and args.csv.exists():
        raise RunError(f"{args.csv} exists already; move it away or choose another --csv")
    if args.csv and not args.csv.resolve().parent.is_dir():
        raise RunError(f"--csv {args.csv}: there is no folder {args.csv.parent}; make it first")
    pairs, lonely_truths, lonely_predictions = find_pairs(args.truth, args.predicted, args.mask)
    for what, paths in (("truth", lonely_truths), ("prediction", lonely_predictions)):
        say_lonely(what, paths)
    masks = [pair.mask for pair in pairs]
    truths = [pair.truth for pair in pairs]
    scores = score_volumes(truths, [pair.predicted for pair in pairs], masks, args.value_range)
    value_range = args.value_range or (0, 1)
    print(f"\n{len(pairs)} volumes of {len({pair.subject for pair in pairs})} subjects; "
          f"{'inside the mask' if args.mask else 'all voxels'}; "
          f"range {value_range[0]:g} to {value_range[1]:g}"
          f"{'' if args.value_range else ' (all truths lie in [0,1])'}; "
          "MAE and NMSE in units of the range.\n")
    print(table(pairs, scores))
    if args.csv:
        text = as_csv(pairs, scores, value_range)
        replace(args.csv, lambda path: path.write_text(text, encoding="utf-8", newline=""))
        print(f"\nwritten: {args.csv}")


def say_lonely(what, paths):
    """Say which files have no partner and are not scored. what: "truth" or "prediction"."""
    if not paths:
        return
    names = ", ".join(str(path) for path in paths[:LISTED])
    more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
    one = len(paths) == 1
    print(f"not scored, {len(paths)} {what}{'' if one else 's'} without a partner: {names}{more}")
