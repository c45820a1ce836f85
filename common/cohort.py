"""Another cohort: a trained model is scored on a data set that it was not trained on.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

    python SCRIPT.py --data OTHER --out RUN --evaluate

scores every subject of OTHER, or the test subjects of --split. The results are written into the
folder RUN/on-OTHER, and those of the run itself stay. The baselines are those that were learned on
the run's own training subjects. They are kept in RUN/baselines.npz when the training ends.
"""
import dataclasses

import numpy as np

from common import metrics
from common.files import RunError, read_arrays, replace
from data import TEXT
from data.layouts import name_of
from data.layouts.words import few

FILE = "baselines.npz"
MOST = 2000             # training slices from which baselines are learned


class TrainingSlices:
    """At most MOST training slices, from which baselines are learned."""

    def __init__(self, ds):
        rows = ds.rows("train", MOST)
        self.contrasts = ds.contrasts
        self.images = ds.images[rows].astype(np.float32)                    # (m, C, H, W)
        self.present = ds.present[rows]                                     # (m, C)

    def of(self, names):
        """The slices of subjects that have all of these contrasts: {contrast: (k, H, W)}.

        Reports need not be there, because no baseline reads them.
        """
        names = [name for name in names if name != TEXT]
        channels = [self.contrasts.index(name) for name in names]
        rows = self.present[:, channels].all(1)                             # (m,)
        return {name: self.images[rows, c] for name, c in zip(names, channels)}


def keep_baselines(run, ds, patterns):
    """Learn the baselines of every task on the training subjects, and write them into the run.

    ds: a data.Dataset. patterns: the tasks, pairs (known contrasts, contrasts to make).
    RunError if the file cannot be written. Nothing happens if it exists.
    """
    if run.rank > 0 or (run.out / FILE).exists():
        return
    train = TrainingSlices(ds)
    content = {}
    for sources, missing in patterns:
        for target in missing:
            both = train.of([*sources, target])
            if len(both[target]) == 0:
                continue
            learned = metrics.learn_baselines(both, sources, target)
            task = "+".join(sources) + "->" + target
            content[f"{task}|mean"] = learned.mean.astype(np.float32)
            if learned.copied is not None:
                content[f"{task}|copied"] = np.array(learned.copied)
                content[f"{task}|table"] = learned.lookup.table

    def save(temporary):
        # The file is opened here, because numpy would add .npz to a name.
        with open(temporary, "wb") as f:
            np.savez_compressed(f, **content)
    replace(run.out / FILE, save)


def stored_baselines(home, task, sources):
    """The baselines that a run keeps, applied to sources: {name: (n, H, W)}; {} if there are none.

    home: folder of the run. task: its name. sources: {contrast: (n, H, W)} in [0,1].
    """
    path = home / FILE
    if not path.exists():
        return {}
    content = read_arrays(path)
    if f"{task}|mean" not in content:
        return {}
    learned = metrics.Baselines(None, content[f"{task}|mean"], None)
    if f"{task}|copied" in content:
        learned.copied = str(content[f"{task}|copied"])
        names = [name for name in sources if name != TEXT]
        learned.lookup = metrics.IntensityLookup.of_table(names, content[f"{task}|table"])
    return learned.predict(sources, len(next(iter(sources.values()))))


def served(run, subjects, files, parts=("train", "val")):
    """The names of those subjects that served the training of this run, as a set.

    A subject is recognised by its files or by its slices, not by its name: in two hospitals, two
    people may both be patient 001. All visits of a person count, if one of them is recognised.
    Subjects that only have a name of the training are new, and the user is told. An older run holds
    no digests. Names count then.

    subjects: a list of data.Subject. files: {name: digests of its files}, see Dataset.files.
    parts: of the split. Subjects of "train" were trained on, and those of "val" chose the weights.
    """
    known = set()
    names = set()
    for part in parts:
        names.update(run.about[part])
        for digests in run.about.get(f"files of {part}", ()):
            known.update(digests)
    if known:
        recognised = [subject for subject in subjects if known & set(files[subject.name])]
    else:
        recognised = [subject for subject in subjects if subject.name in names]
    people = {subject.person for subject in recognised}
    found = {subject.name for subject in subjects if subject.person in people}
    alike = sorted(subject.name for subject in subjects
                   if subject.name in names and subject.name not in found)
    if alike:
        run.say(f"{len(alike)} subjects have the name of a training subject, but other images "
                f"({few(alike)}); they count as new people")
    return found


def other_cohort(run, ds, split_typed):
    """The data set as it shall be scored. It is another one than the run's, if it is not its own.

    Data are another cohort if their content differs. All subjects that did not serve the training
    are then scored, unless the user typed a --split. The run then writes into RUN/on-NAME.

    Returns (ds, home). home is the folder of the run if its stored baselines count, because this is
    another cohort, or because there is no training part. Otherwise it is None.

    Raises RunError if a test subject served the training, or if there is no other subject.
    """
    if not run.about:
        return ds, None
    home = run.out
    seen = served(run, ds.complete, ds.files)
    other = ds.fingerprint != run.about["data"]
    if other and not split_typed:
        names = sorted(subject.name for subject in ds.complete if subject.name not in seen)
        if not names:
            raise RunError(f"{ds.folder}: every subject served the training of {home}; "
                           "choose other data")
        if seen:
            run.say(f"{len(seen)} subjects of {ds.folder} served the training and are left out: "
                    f"{few(sorted(seen))}")
        ds = dataclasses.replace(ds, split={"train": [], "val": [], "test": names})
    wrong = sorted(seen & set(ds.split["test"]))
    if wrong:
        raise RunError(f"{len(wrong)} test subjects served the training ({few(wrong)}); "
                       "give the same --split as in the training")
    if other:
        run.out = home / f"on-{name_of(ds.folder)}"
        run.out.mkdir(parents=True, exist_ok=True)
        run.say(f"{ds.folder} is another cohort: {len(ds.split['test'])} subjects are scored; "
                f"results go to {run.out}")
    return ds, home if other or not ds.split["train"] else None
