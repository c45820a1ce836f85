"""What does a model do with its sentences?  One value after another, and other people's sentences.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

A model is asked by  model.make(subject, source, volume, wanted) -> (K, Z, H, W)  with `wanted` a
list of pairs (contrast, record); model.records says what is known of scans (common/sentences.py).
With the phantoms neuro the true image is known for every record.
"""
import csv
import io
import time

import nibabel as nib
import numpy as np
import scipy  # scipy.stats is imported when it is needed: it takes a second
import torch

from common import metrics, pictures
from common.files import RunError, replace
from common.sentences import require_fields
from common.tiles import starts
from data import normalise, phantom
from data.volumes import fit

MOST = 10               # test subjects of a study


def subjects_with(ds, contrasts):
    """Up to MOST test subjects that have these contrasts: [(name, its rows)]."""
    rows = ds.having(ds.rows("test"), contrasts)
    names = list(dict.fromkeys(ds.subject[rows]))[:MOST]
    return [(str(name), rows[ds.subject[rows] == name]) for name in names]


def volume_of(ds, rows, contrast):
    """(Z, H, W) float32 of these rows."""
    return np.asarray(ds.images[rows][:, ds.contrasts.index(contrast)], np.float32)


class Truth:
    """True images of a phantom subject for any record, on its kept slices."""

    def __init__(self, ds, name, rows):
        self.anatomy, self.known = phantom.neuro_truth(ds.folder, name)
        self.size = ds.size
        self.kept = ds.slice_number[rows]

    def slices(self, array):
        """An array of the phantom (X, Y, Z) as its kept slices, upright: (Z, H, W)."""
        image = nib.Nifti1Image(array.astype(np.float32), self.anatomy.grid.affine())
        return fit(nib.as_closest_canonical(image).get_fdata(), self.size)[self.kept]

    def image(self, contrast, record):
        """(Z, H, W) in [0,1], scaled as scans are."""
        array = phantom.neuro_true(self.anatomy, contrast, record)
        return self.slices(normalise(array, None, contrast)[0])

    def tissues(self):
        """{tissue: bool (Z, H, W)}."""
        found = phantom.neuro_tissues(self.anatomy)
        return {tissue: self.slices(mask) > 0.5 for tissue, mask in found.items()}


def truth_of(ds, name, rows):
    """The Truth of a subject, or None if the data are no phantoms of this kind."""
    if not ds.phantom or not (ds.folder / "participants.tsv").exists():
        return None
    return Truth(ds, name, rows)


def thirds(volume):
    """Parts of a scan (Z, H, W) by its own intensities, where nobody knows the tissues."""
    inside = volume > 0
    low, high = np.quantile(volume[inside], [1 / 3, 2 / 3])
    return {"darkest third": inside & (volume <= low),
            "middle third": inside & (volume > low) & (volume <= high),
            "brightest third": inside & (volume > high)}


# ---- one field takes many values -----------------------------------------------------------------


def sweep(run, ds, model, target, changes, field, values):
    """Make `target` of test subjects from T1w, with one field of its record at many values.

    The encoder of the model runs once for all values.  Writes sweep-TARGET-FIELD.csv, with the mean
    of every tissue, and .png.  With phantoms both also hold the truth, and it is said how well the
    ratio of two tissues follows it.

    changes: {field: value}, further fields that shall differ.
    RunError if no test subject has T1w, or if the sentence about the target does not tell `field`.
    """
    try:
        require_fields([field], target, f"--sweep {field}")
    except ValueError as error:
        raise RunError(str(error), status=2) from error
    rows_out = []
    followed = []
    sheet = []
    labels = []
    name_out = f"sweep-{target}-{field}"
    chosen = subjects_with(ds, ["t1"])
    if not chosen:
        raise RunError("sweep: no test subject has T1w, from which it starts")
    for name, rows in chosen:
        source = volume_of(ds, rows, "t1")                                  # (Z, H, W)
        record = {**model.records.of(name, target), **changes}
        records = [{**record, field: float(value)} for value in values]
        made = model.make(name, "t1", source, [(target, one) for one in records])   # (K, Z, H, W)
        truth = truth_of(ds, name, rows)
        true = None
        parts = thirds(source)
        if truth:
            true = [truth.image(target, one) for one in records]            # K times (Z, H, W)
            parts = truth.tissues()
        ratios = []
        for k, value in enumerate(values):
            means = {part: made[k][mask].mean() for part, mask in parts.items()}
            line = {"subject": name, field: value, **means}
            if truth:
                true_means = {part: true[k][mask].mean() for part, mask in parts.items()}
                line.update({f"{part} (truth)": mean for part, mean in true_means.items()})
                low, high = ("csf", "wm") if target == "flair" else ("gm", "csf")
                with np.errstate(divide="ignore", invalid="ignore"):
                    ratios.append((means[low] / means[high], true_means[low] / true_means[high]))
            rows_out.append(line)
        # In a tiny phantom, no voxel may hold one tissue alone.
        if truth and np.isfinite(ratios).all():
            followed.append(np.array(ratios))                               # (K, 2)
        if not sheet:
            middle = len(source) // 2
            sheet.append([source[middle], *(image[middle] for image in made)])
            labels.append("made")
            if truth:
                sheet.append([source[middle], *(image[middle] for image in true)])
                labels.append("truth")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows_out[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows_out)
    replace(run.out / f"{name_out}.csv",
            lambda tmp: tmp.write_text(text.getvalue(), encoding="utf-8", newline=""))
    titles = ["T1w", *(f"{field} {value:g}" for value in values)]
    pictures.grid(run.out / f"{name_out}.png", sheet, titles, labels,
                  note=f"{target} of {chosen[0][0]}, with {field} at several values")
    if followed:
        report_ratio(run, target, field, values, followed)
    run.say(f"written: {run.out / name_out}.csv and .png")


def report_ratio(run, target, field, values, followed):
    """Say how well a ratio of two tissues follows the truth.

    followed: one (K, 2) array per subject, the ratio in what was made and in the truth.
    """
    names = "CSF/WM" if target == "flair" else "GM/CSF"
    mean = np.mean(followed, 0)                                             # (K, 2)
    ranks = []
    for ratios in followed:
        moves = np.ptp(ratios[:, 0]) > 0                    # a model that does not read the field
        ranks.append(scipy.stats.spearmanr(*ratios.T).statistic if moves else 0.0)
    slopes = [scipy.stats.linregress(ratios[:, 1], ratios[:, 0]).slope for ratios in followed]
    run.say(f"{target}, {names} over {field}, mean of {len(followed)} subjects:")
    for value, (made, true) in zip(values, mean):
        run.say(f"  {field} {value:g}: made {made:.3f}, truth {true:.3f}")
    low = [values[mean[:, column].argmin()] for column in (0, 1)]
    run.say(f"  rank correlation {np.mean(ranks):.3f}, slope {np.mean(slopes):.2f}; "
            f"smallest at {field} {low[0]:g}, in truth at {low[1]:g}")


# ---- other people's sentences --------------------------------------------------------------------


def other_sentences(run, ds, model, pairs):
    """PSNR of test subjects if the target is described by other records than its own.

    own         the record of the scan
    other       that of the next test subject's scan
    typical     the typical record of the contrast
    no numbers  only the modality is known
    With phantoms there are two ceilings: the true anatomy, rendered with the typical record and
    with its own.  A model that does not read the numbers can hardly get above the first.

    pairs: [(source, target)].  Writes text.csv and says the table.
    """
    table = []
    for source, target in pairs:
        chosen = subjects_with(ds, [source, target])
        if len(chosen) < 2:
            continue
        found = {}
        for number, (name, rows) in enumerate(chosen):
            volume = volume_of(ds, rows, source)                            # (Z, H, W)
            true = volume_of(ds, rows, target)                              # (Z, H, W)
            own = model.records.of(name, target)
            other = model.records.of(chosen[(number + 1) % len(chosen)][0], target)
            typical = {**own, **model.records.typical[target]}
            records = {"own": own, "other": other, "typical": typical, "no numbers": {}}
            wanted = [(target, record) for record in records.values()]
            images = dict(zip(records, model.make(name, source, volume, wanted)))
            truth = truth_of(ds, name, rows)
            if truth:
                images["ceiling: typical"] = truth.image(target, typical)
                images["ceiling: own"] = truth.image(target, truth.known[target])
            for title, image in images.items():
                found.setdefault(title, []).append(metrics.psnr(true, image, 1).mean())
        table.append({"task": f"{source}->{target}", "n": len(chosen),
                      **{title: f"{np.mean(values):.2f}" for title, values in found.items()}})
    if not table:
        raise RunError("text: no two test subjects have the same pair of contrasts")
    columns = list(table[0])
    lines = [columns, ["---"] * len(columns)] + [[str(row[c]) for c in columns] for row in table]
    run.say("\nPSNR in dB, mean of the subjects; columns: whose record described the target\n")
    for line in lines:
        run.say("| " + " | ".join(line) + " |")
    text = "\n".join(",".join(line) for line in [columns, *lines[2:]]) + "\n"
    replace(run.out / "text.csv", lambda tmp: tmp.write_text(text, encoding="utf-8", newline=""))
    run.say(f"\nwritten: {run.out / 'text.csv'}")


# ---- speed ---------------------------------------------------------------------------------------


def seconds(model, task, method):
    """The seconds for the volume of each subject of an evaluation.Task, as a row of results.json.

    One target is made from the source.  The first volume is made twice, because the first call
    warms up.
    """
    source = next(iter(task.sources))
    names = list(dict.fromkeys(task.subjects))
    spent = {}
    for name in [names[0], *names]:
        volume = task.sources[source][task.subjects == name]                # (Z, H, W)
        wanted = [(task.target, model.records.of(str(name), task.target))]
        begin = time.perf_counter()
        model.make(str(name), source, volume, wanted)
        spent[str(name)] = time.perf_counter() - begin
    return metrics.row(task.name, method, "seconds", spent)


def speed(cfg, run, model, shape=(182, 218, 182), values=9):
    """Say how long a head of 1 mm takes, for one target and for a sweep of nine values.

    The time for a part of the slices is measured and scaled up by the number of tiles.  What large
    convolutions of the same kind reach on this machine is said beside it.
    """
    slab = min(shape[2], 2 * cfg.slices)
    layers = [len(starts(n, cfg.slices, cfg.overlap)) for n in (shape[2], slab)]    # of tiles
    head = np.random.default_rng(0).random((slab, *shape[:2])).astype(np.float32)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in head.shape), indexing="ij")
    head *= y ** 2 + x ** 2 < 1                                             # as wide as a head
    target = model.contrasts[-1]
    record = model.records.typical.get(target, {})
    spent = []
    for count in (1, 1, values):                            # the first call warms up
        begin = time.perf_counter()
        model.make("", model.contrasts[0], head, [(target, record)] * count)
        spent.append(time.perf_counter() - begin)
    whole = spent[1] * layers[0] / layers[1]
    run.say(f"a volume of {' x '.join(map(str, shape))}: about {whole:.3g} s (from {slab} slices); "
            f"{values} values of a sweep take {spent[2] / spent[1]:.2f} times as long as one")
    width = cfg.width
    conv = torch.nn.Conv2d(width, width, 3, padding=1)
    conv.to(run.device, memory_format=torch.channels_last)
    images = torch.randn(cfg.sample_batch, width, cfg.patch, cfg.patch, device=run.device)
    images = images.to(memory_format=torch.channels_last)
    with torch.no_grad(), run.autocast():
        conv(images)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(10):
            conv(images)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
    pace = (time.perf_counter() - begin) / 10
    flops = 2 * 9 * width ** 2 * cfg.patch ** 2 * cfg.sample_batch
    run.say(f"a single 3 x 3 convolution of {width} channels reaches "
            f"{flops / pace / 1e9:.0f} GFLOP/s here")
