"""The value of synthetic images for a diagnosis or a segmentation: RLBCD, Sec. 4.8 and 4.9.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

A second network gets the source A and an image B, and must predict the label of a subject, or draw
its lesions.  It is trained and tested on the scored subjects alone, in five folds.  The paper
compares A alone with A and a synthetic B.  We add what the paper lacks: A with the true B, which
shows what a perfect synthesis would be worth.
"""
from common.classify import (
    DEMO_CLASSIFIER,
    classification_rows,
    cross_validate_classifier,
)
from common.downstream import (
    DEMO_SEGMENTER,
    cross_validate_segmenter,
    segmentation_rows,
    two_channels,
)
from common.files import RunError

ALONE = "A alone"
TRUE = "A and the true B"


def value_rows(run, ds, task, what):
    """Rows of results.json for the source alone, for the model's result, and for the truth.

    ds: data.Dataset, whose subjects have the labels (labels.csv) or the masks.
    task: common.evaluation.Task, the first of whose sources is A.
    what: "label" gives the rows "auc" and "acc", "lesion" the rows "dice" and "jaccard".

    Phantoms get small networks.  RunError if labels or masks are missing or too few.
    """
    A = next(iter(task.sources.values()))                               # (n, H, W)
    name = next(iter(task.results))
    inputs = {ALONE: two_channels(A),
              name: two_channels(A, task.results[name]),
              TRUE: two_channels(A, task.truth)}                        # (n, 2, H, W) each
    rows = []
    try:
        for method, images in inputs.items():
            run.say(f"{what} from {method}: five folds")
            rows += one_method(run, ds, task, what, method, images)
    except ValueError as error:
        raise RunError(f"--value {what}: {error}") from error
    for row in rows:
        if row["mean"] is not None and not row.get("variant"):
            extra = ""
            if "standard_error" in row:
                extra = f" (its standard error with so few subjects: {row['standard_error']:.2f})"
            if "majority" in row:
                extra = f" (always naming the larger class: {row['majority']:.2f})"
            run.say(f"{row['method']}: {row['metric']} {row['mean']:.3f}{extra}")
    return rows


def one_method(run, ds, task, what, method, images):
    """The rows of one method.  images: (n, 2, H, W)."""
    if what == "lesion":
        if task.labels is None:
            raise RunError(f"--value lesion: not every subject in {ds.folder} has a mask")
        size = DEMO_SEGMENTER if ds.phantom else {}
        found = cross_validate_segmenter(run, images, task.labels > 0, task.subjects, **size)
        return segmentation_rows(task.name, method, found)
    labels = {}
    for subject in ds.subjects:
        if "label" in subject.meta:
            labels[subject.name] = subject.meta["label"]
    missing = sorted(set(map(str, task.subjects)) - set(labels))
    if missing:
        raise RunError(f"--value label: {missing[0]} has no label; write one for every subject "
                       f"into {ds.folder / 'labels.csv'} (subject,label)")
    size = DEMO_CLASSIFIER if ds.phantom else {}
    found = cross_validate_classifier(run, images, task.subjects, labels, **size)
    return classification_rows(task.name, method, found)
