"""Patients with several modalities: images from any streams, reports scored, findings in images.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

fill_images    missing images from the streams that there are, also from reports
overall        all that is scored beside the images themselves:
report_rows    reports made from images: BLEU, ROUGE-L, beside standing answers
finding_rows   does an image show what the report says?  Read by a classifier of real images
realism_rows   are images made from reports like real ones, as a set?
diversity_rows are several images made from one report alike?
joint_rows     all streams made together from nothing: do they speak of one patient?
draw_joint     a picture of streams made together from a report

Findings are known for the phantoms cxr only, from findings.csv.  On other data, the rows of
findings and joint_rows have nothing to say.  All this is done by the first process.
"""
import csv
import math
from collections import Counter

import numpy as np
import torch

from common import metrics, pictures
from common.realism import diversity, frechet_distance, niqe, niqe_statistics, pooled_pixels
from common.report_scores import bleu, rouge_l
from common.tasks import named_directions
from data import TEXT, clean_report
from data.phantom import cxr_findings_in

NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L")
# Finding -> the two answers that are told apart.  The side of a lesion or of an effusion counts
# where there is one.
FINDINGS = {"lesion": ("left", "right"), "effusion": ("left", "right"),
            "heart": ("enlarged", "normal")}
TOGETHER = 64           # patients that joint_rows invents
TEXTURES = 200          # training images, at most, that NIQE learns from
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the ridge regression; the best on held-out images


# ---- images --------------------------------------------------------------------------------------


def report_of(model, subject):
    """The report of a subject, or --given.  ValueError if there is none."""
    report = model.reports.get(subject) or clean_report(model.cfg.given, mimic=True)
    if not report.strip(" ."):                                         # "" is cleaned to "."
        raise ValueError(f"fill: text is known, but there is no report of {subject}; "
                         "give one with --given, from Python as load(..., given=\"...\")")
    return report


def fill_images(model, u, known, keys, watch=None, wanted=None):
    """Make every image that is missing, with model.generate: once for all slices of equal streams.

    u: (B, C, H, W) in [0,1]; known: (B, C) bool; keys: (subject, slice number) of each slice;
    watch: a list for the states of the sampler, or None; wanted: (B, C) bool, which of the
    missing streams to make, by default all.  The channel "text" of u is empty; where it is
    known, the report of the subject is used, or --given.
    Returns u with the images in place.
    """
    filled = u.clone()                                                  # (B, C, H, W)
    missing = ~known if wanted is None else wanted & ~known
    kinds = {}
    for b in range(len(u)):
        kinds.setdefault((tuple(known[b].tolist()), tuple(missing[b].tolist())), []).append(b)
    for (here, absent), rows in kinds.items():
        given = {}
        for c, stream in enumerate(model.contrasts):
            if here[c] and stream == TEXT:
                given[stream] = [report_of(model, keys[b][0]) for b in rows]
            elif here[c]:
                given[stream] = u[rows, c, None]                        # (b, 1, H, W)
        make = [s for s, gone in zip(model.contrasts, absent) if gone and s != TEXT]
        seen = None if watch is None else []
        made = model.generate(given, make, [keys[b] for b in rows], seen)
        for stream, images in made.items():
            filled[rows, model.contrasts.index(stream)] = images[:, 0].clamp(0, 1)
        if watch is not None and make:                      # only the first stream is watched
            for time, states, ends in seen:
                pair = [2 * model.decode(make[0], part[make[0]]) - 1 for part in (states, ends)]
                watch.append((f"t = {time}", *pair))        # images in [-1,1]
    return filled


def autoencoder_alone(cfg, run, model, truth, notes):
    """The truth through the autoencoder, the best that can be done with it.  "": of any stream."""
    images = []
    for part in np.array_split(truth, math.ceil(len(truth) / cfg.sample_batch)):
        x = torch.from_numpy(part).to(run.device)[:, None]                  # (b, 1, H, W)
        x_hat = model.codecs.decode("", model.codecs.encode("", x))         # (b, 1, H, W)
        images.append(x_hat[:, 0].cpu().numpy())
    return {"autoencoder alone": np.concatenate(images)}


def overall(cfg, run, ds, model, tasks):
    """Rows about reports, about how real the images look, and about streams that are made together.

    With --only, streams are not made together, and reports are made from the named streams alone.
    """
    sources = [(stream,) for stream in model.partners_of(TEXT, ds.contrasts)]
    if cfg.only:
        named = named_directions(cfg.only, ds.contrasts)
        sources = [known for known, make in named if TEXT in make]
    rows = report_rows(cfg, run, ds, model, sources)
    rows += finding_rows(run, ds, tasks)
    rows += realism_rows(run, ds, tasks)
    rows += diversity_rows(cfg, run, ds, model, tasks)
    return rows if cfg.only else rows + joint_rows(cfg, run, ds, model)


# ---- reports -------------------------------------------------------------------------------------


def report_rows(cfg, run, ds, model, sources):
    """Score reports made from images.  sources: a list of tuples of image streams, one per task.

    model: with .generate and .codecs, as medm2g.Model.
    Returns rows of results.json: bleu1 .. bleu4 of all reports together; rouge per subject; and the
    share of reports that tell each finding as it is.
    Beside them stand the most frequent report of the training, and one drawn from it at random.
    "text VAE alone" is what the decoder makes of the true report's own latent, the best that can be
    reached; "of another patient" is the same with latents in a wrong order.
    """
    rows = []
    for known in sources:
        task = "+".join(known) + "->text"
        chosen = ds.having(ds.spread("test", cfg.test_slices), [TEXT, *known])
        if len(chosen) < 2:
            continue
        truth = ds.reports(chosen)
        made = generated(cfg, run, ds, model, chosen, known, [TEXT])[TEXT]
        trained = [text for text in ds.reports(ds.rows("train")) if text]
        g = np.random.default_rng(0)
        latents = model.codecs.encode(TEXT, truth)                          # (n, Z)
        # The slices of a patient follow each other, so the row before is often the same patient's.
        others = latents.roll(len(latents) // 2, 0)                         # (n, Z)
        answers = {
            "MedM2G": made,
            "most frequent report": [Counter(trained).most_common(1)[0][0]] * len(truth),
            "random report": [trained[i] for i in g.integers(len(trained), size=len(truth))],
            "text VAE alone": model.codecs.decode(TEXT, latents),
            "of another patient": model.codecs.decode(TEXT, others)}
        rows += scored(run, ds, task, chosen, truth, answers)
        run.write_json(f"reports_from_{'+'.join(known)}.json",
                       [{"subject": str(ds.subject[r]), "truth": t, "made": m}
                        for r, t, m in zip(chosen, truth, made)])
    return rows


def scored(run, ds, task, chosen, truth, answers):
    """Rows of several answers {method: reports} to one task.  Says them as a table, too."""
    rows = []
    known = findings_of(ds)
    titles = [*NAMES, *FINDINGS] if known else NAMES
    lines = [f"Reports, {task}; n = {len(truth)}; BLEU of all reports together",
             "", f"| method | {' | '.join(titles)} |", "|" + " --- |" * (len(titles) + 1)]
    subjects = [str(ds.subject[r]) for r in chosen]
    for method, reports in answers.items():
        four = bleu(truth, reports)
        mean, each = rouge_l(truth, reports)
        cells = [*four, mean]
        for number, value in enumerate(four, 1):
            rows.append(metrics.row(task, method, f"bleu{number}", {"all reports": value},
                                    unit="set"))
        rows.append(metrics.row(task, method, "rouge", metrics.per_subject(each, subjects)))
        for finding in FINDINGS if known else ():
            hits = [float(findings_in(report)[finding] == known[name][finding])
                    for name, report in zip(subjects, reports)]
            rows.append(metrics.row(task, method, finding, metrics.per_subject(hits, subjects)))
            cells.append(sum(hits) / len(hits))
        lines.append(f"| {method} | " + " | ".join(f"{value:.3f}" for value in cells) + " |")
    run.say("\n" + "\n".join(lines) + "\n")
    return rows


def generated(cfg, run, ds, model, rows, sources, make):
    """Streams made from streams of some rows: {stream: images (n, H, W), or n texts}."""
    done = []
    for part in run.batches(f"{'+'.join(sources)}->{'+'.join(make)}", list(rows),
                            cfg.sample_batch):
        u = run.fetch(ds.images, part)                                      # (B, C, H, W)
        given = {}
        for stream in sources:
            here = ds.reports(part) if stream == TEXT else u[:, ds.contrasts.index(stream), None]
            given[stream] = here
        done.append(model.generate(given, make, ds.keys(part)))
    return together(done, make)


def together(parts, make):
    """Several answers of model.generate as one: {stream: images (n, H, W), or n texts}."""
    result = {}
    for stream in make:
        if stream == TEXT:
            result[stream] = [text for part in parts for text in part[stream]]
        else:
            result[stream] = torch.cat([part[stream] for part in parts])[:, 0].cpu().numpy()
    return result


# ---- findings ------------------------------------------------------------------------------------


def findings_of(ds):
    """{subject: {finding: answer, or "" if there is none}} of the phantoms; None for other data."""
    path = ds.folder / "findings.csv"
    if not ds.phantom or not path.exists():
        return None
    with open(path, encoding="utf-8", newline="") as file:
        return {row["id"]: {"lesion": row["lesion_side"], "effusion": row["effusion"],
                            "heart": row["heart"]} for row in csv.DictReader(file)}


def findings_in(report):
    """What a report says: {finding: answer, or ""}."""
    found = cxr_findings_in(report)
    lesion = found["lesion"]
    return {"lesion": lesion["side"] if lesion else "", "effusion": found["effusion"] or "",
            "heart": found["heart"] or ""}


class Reader:
    """Tells two answers apart by a linear map of coarse pixels: ridge regression on real images.

    images: (n, H, W).  right: (n,) bool, where the first answer is right.  A fifth of the images
    chooses the strength of the penalty.
    """

    def __init__(self, images, right):
        x = self.features(images)                                           # (n, 257)
        y = np.where(right, 1.0, -1.0)                                      # (n,)
        apart = np.arange(len(x)) % 5 == 0

        def hits(strength):
            weights = solve(x[~apart], y[~apart], strength)
            return ((x[apart] @ weights > 0) == (y[apart] > 0)).mean()
        self.weights = solve(x, y, max(STRENGTHS, key=hits))                # (257,)

    @staticmethod
    def features(images):
        """(n, H, W) -> (n, 257): 16 x 16 means of pixels, less their average, and a 1."""
        n, height, width = images.shape
        blocks = np.asarray(images, np.float64).reshape(n, 16, height // 16, 16, width // 16)
        coarse = blocks.mean((2, 4)).reshape(n, 256)
        coarse = coarse - coarse.mean(1, keepdims=True)
        return np.concatenate([coarse, np.ones((n, 1))], axis=1)

    def __call__(self, images):
        """(n, H, W) -> (n,) bool, True for the first answer."""
        return self.features(images) @ self.weights > 0


def solve(x, y, strength):
    """Weights of a ridge regression."""
    return np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)


def readers_of(ds, stream, known):
    """{finding: Reader} of a stream, learned on its training images."""
    rows = ds.having(ds.rows("train"), [stream])
    images = np.asarray(ds.images[rows], np.float32)[:, ds.contrasts.index(stream)]
    found = {}
    for finding, (first, _) in FINDINGS.items():
        answers = np.array([known[str(ds.subject[r])][finding] for r in rows])
        clear = answers != ""
        if clear.sum() >= 20:
            found[finding] = Reader(images[clear], answers[clear] == first)
    return found


def finding_rows(run, ds, tasks):
    """The share of made images that show each finding as it is, where there is one.

    tasks: a list of evaluation.Task.  Returns rows of results.json, and says them as a table.
    "truth" is what the reader says of the true images, the best that can be reached.
    """
    known = findings_of(ds)
    if not known:
        return []
    rows = []
    lines = ["Findings read from the images by a classifier of real images: share that is right "
             "(n)", "", f"| task | method | {' | '.join(FINDINGS)} |",
             "|" + " --- |" * (len(FINDINGS) + 2)]
    for task in tasks:
        readers = readers_of(ds, task.target, known)
        for method, images in {**task.results, "truth": task.truth}.items():
            cells = []
            for finding, (first, _) in FINDINGS.items():
                told = np.array([known[str(name)][finding] for name in task.subjects])
                clear = told != ""
                if finding not in readers or not clear.any():
                    cells.append("-")
                    continue
                hits = (readers[finding](images[clear]) == (told[clear] == first)).astype(float)
                rows.append(metrics.row(task.name, method, finding, metrics.per_subject(
                    hits, task.subjects[clear])))
                cells.append(f"{hits.mean():.2f} ({clear.sum()})")
            lines.append(f"| {task.name} | {method} | {' | '.join(cells)} |")
    run.say("\n" + "\n".join(lines) + "\n")
    return rows


def realism_rows(run, ds, tasks):
    """Rows that ask of each task from a report: do its images look like real ones, as a set?

    fd is the Frechet distance between made and true images.  Its features are 8 x 8 means of
    pixels, because no trained network for medical images is at hand.  It is no FID, and says little
    of details.  niqe is a distance of textures, to those of the training images (see
    common/realism.py).
    "real images" are as many training images for fd, and the true ones for niqe: what a perfect
    method would reach.
    """
    rows = []
    lines = ["Frechet distance of coarse pixels (not FID), and NIQE to our own training images; "
             "lower is better", "", "| task | method | distance | NIQE | n |",
             "| --- | --- | --- | --- | --- |"]
    for task in tasks:
        if TEXT not in task.sources or len(task.truth) < 2:
            continue
        own = ds.having(ds.rows("train"), [task.target])[:max(TEXTURES, len(task.truth))]
        trained = np.asarray(ds.images[own], np.float32)[:, ds.contrasts.index(task.target)]
        texture = texture_of(run, trained, task.target)
        truth = pooled_pixels(task.truth)                                   # (n, 64)
        compared = {name: (images, images) for name, images in task.results.items()}
        compared["real images"] = (trained[:len(task.truth)], task.truth)
        for method, (images, others) in compared.items():
            if len(images) < 2:
                continue
            found = {"fd": frechet_distance(truth, pooled_pixels(images))}
            if texture is not None:
                found["niqe"] = float(np.nanmean(niqe(others.clip(0, 1), texture)))
            for metric, value in found.items():
                rows.append(metrics.row(task.name, method, metric, {"all images": value},
                                        unit="set"))
            texts = [f"{found['fd']:.3f}", f"{found['niqe']:.2f}" if "niqe" in found else "–"]
            lines.append(f"| {task.name} | {method} | {' | '.join(texts)} | {len(images)} |")
    if rows:
        run.say("\n" + "\n".join(lines) + "\n")
    return rows


def texture_of(run, images, target):
    """NiqeStatistics of some training images; None, and a sentence, if NIQE cannot be had."""
    if min(images.shape[1:]) < 64:
        run.say(f"no NIQE of {target}: the images have fewer than 64 pixels")
        return None
    try:
        return niqe_statistics(images[:TEXTURES])
    except ValueError as error:
        run.say(f"no NIQE of {target}: {error}")
        return None


def diversity_rows(cfg, run, ds, model, tasks):
    """Rows "msssim": how alike are four images that are made from one report (as in Table 5)?

    The mean MS-SSIM over their pairs, for four reports; lower means more varied.  "real images" are
    true images of different patients.
    """
    rows = []
    lines = ["MS-SSIM of four images from one report (lower: more varied), mean over four reports",
             "", "| task | made | real images of different patients |", "| --- | --- | --- |"]
    for task in tasks:
        if list(task.sources) != [TEXT]:
            continue
        chosen = ds.having(ds.spread("test", 1), [TEXT, task.target])[:4]
        if len(chosen) < 2:
            continue
        keys = [(*key, number) for key in ds.keys(chosen) for number in range(4)]
        given = [report for report in ds.reports(chosen) for _ in range(4)]
        parts = []
        for part in run.batches(f"{task.name}, four of each", range(len(keys)), cfg.sample_batch):
            parts.append(model.generate({TEXT: [given[i] for i in part]}, [task.target],
                                        [keys[i] for i in part]))
        made = together(parts, [task.target])[task.target].clip(0, 1)           # (4 k, H, W)
        if min(made.shape[1:]) < 11:
            continue                                            # MS-SSIM has a window of 11 pixels
        values = {str(ds.subject[r]): diversity(made[4 * i:4 * i + 4])
                  for i, r in enumerate(chosen)}
        first = np.unique(task.subjects, return_index=True)[1]  # one image of each patient
        real = diversity(np.asarray(task.truth[first[:8]]))
        rows.append(metrics.row(task.name, "MedM2G", "msssim", values))
        rows.append(metrics.row(task.name, "real images", "msssim", {"all images": real},
                                unit="set"))
        lines.append(f"| {task.name} | {np.mean(list(values.values())):.3f} | {real:.3f} |")
    if rows:
        run.say("\n" + "\n".join(lines) + "\n")
    return rows


def joint_rows(cfg, run, ds, model):
    """Make all streams together from nothing, and ask whether they tell of one patient.

    Returns rows: for each two streams and each finding, the share of the invented patients in whom
    both show the same.  "strangers" is the same for streams of two different inventions.  With
    reports, those patients count whose report tells the finding.
    """
    known = findings_of(ds)
    if not known or TEXT not in ds.contrasts:
        return []
    streams = list(ds.contrasts)
    keys = [("invented", i) for i in range(TOGETHER)]
    parts = [model.generate({}, streams, part)
             for part in run.batches("all streams together", keys, cfg.sample_batch)]
    made = together(parts, streams)
    told = [findings_in(report) for report in made[TEXT]]
    rows = []
    lines = [f"{TOGETHER} patients invented, all streams together: share with the same finding in "
             "both (in streams of two different patients; n)", "",
             f"| streams | {' | '.join(FINDINGS)} |", "|" + " --- |" * (len(FINDINGS) + 1)]
    read = {TEXT: {finding: np.array([found[finding] == first for found in told])
                   for finding, (first, _) in FINDINGS.items()}}
    for stream in streams:
        if stream != TEXT:
            readers = readers_of(ds, stream, known)
            read[stream] = {finding: reader(made[stream]) for finding, reader in readers.items()}
    for i, first in enumerate(read):
        for second in list(read)[i + 1:]:
            cells = []
            for finding in FINDINGS:
                clear = np.array([found[finding] in FINDINGS[finding] for found in told])
                if not (finding in read[first] and finding in read[second] and clear.sum() > 1):
                    cells.append("-")
                    continue
                a, b = read[first][finding][clear], read[second][finding][clear]
                same = float((a == b).mean())
                strangers = float(np.mean([(a == np.roll(b, k)).mean() for k in range(1, len(a))]))
                for method, value in (("MedM2G", same), ("strangers", strangers)):
                    rows.append(metrics.row(f"{first}+{second}", method, f"same {finding}",
                                            {"all patients": value}, unit="set"))
                cells.append(f"{same:.2f} ({strangers:.2f}; {clear.sum()})")
            lines.append(f"| {first}, {second} | {' | '.join(cells)} |")
    run.say("\n" + "\n".join(lines) + "\n")
    shown = [s for s in streams if s != TEXT]
    pictures.grid(run.out / "invented.png", [[made[s][i] for s in shown] for i in range(4)], shown,
                  [" ".join(report.split()[:30]) for report in made[TEXT][:4]],
                  note="all made together, from nothing; reports are cut after 30 words")
    return rows


def draw_joint(cfg, run, ds, model, count=4):
    """Fig. 4 (c), joint.png: all images made of some test reports, beside the true images."""
    shown = [s for s in ds.contrasts if s != TEXT]
    rows = ds.having(ds.rows("test"), ds.contrasts)
    if TEXT not in ds.contrasts or len(rows) == 0:
        run.say("no test subject has all streams; no picture of them is drawn")
        return
    rows = rows[:count]
    made = generated(cfg, run, ds, model, rows, [TEXT], shown)
    grid = []
    for i, r in enumerate(rows):
        true = np.asarray(ds.images[[r]], np.float32)[0]                    # (C, H, W)
        grid.append([made[s][i] for s in shown] + [true[ds.contrasts.index(s)] for s in shown])
    titles = [f"{s}, made" for s in shown] + [f"{s}, true" for s in shown]
    pictures.grid(run.out / "joint.png", grid, titles, ds.reports(rows),
                  note="made together, from the report alone")
