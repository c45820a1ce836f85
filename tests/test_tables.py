"""common/tables.py: tables of a paper against numbers worked by hand, and against what a row does when it is run by itself."""
import argparse
import csv
import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import apt
import medm2g
import metadb
from common import cli, metrics, tables
from common.files import RunError, read_checkpoint
from common.table_pages import MEASURES
from common.tasks import named_directions
from data.layouts import CONTRASTS

TABLES_APT, TABLES_METADB, TABLES_MEDM2G = (tables.load_tables(name) for name in ("apt", "metadb", "medm2g"))
SUBJECTS = [f"s{i}" for i in range(8)]
NOISE = np.array([3.0, -1.0, 2.0, 0.5, -0.2, 1.7, 0.9, 2.5])


def content(offsets, seed=0):
    """A results.json: method "M" and a baseline on tasks a->b, b->a; psnr 20 + NOISE + offset of the task, ssim half of it / 100."""
    rows = []
    for task, offset in offsets.items():
        psnr = dict(zip(SUBJECTS, 20 + offset + NOISE * (1 + offset)))
        rows += [metrics.row(task, "M", "psnr", psnr), metrics.row(task, "M", "ssim", {s: v / 200 for s, v in psnr.items()}),
                 metrics.row(task, "copy", "psnr", dict.fromkeys(SUBJECTS, 15.0)), metrics.row(task, "copy", "ssim", dict.fromkeys(SUBJECTS, 0.5))]
    return {"rows": rows, "protocol": "2 slices", "phantom": True, "data": "data/x", "config": {"M": 400}, "seed": seed}


TABLE = {"title": "a title", "against": "full", "rows": {"full": {}, "worse": {"M": 10, "stage2": False}, "other": {"prior": "zero"}}}
PAPER = {"Theirs": {"a->b": {"psnr": 21.5, "psnr_std": 1.0, "ssim": 0.9, "ssim_std": 0.02}, "c->d": {"psnr": 1.0}}, "full": {"a->b": {"psnr": 25.25, "ssim": 0.912}}}


@pytest.fixture
def found():
    return {"full": [content({"a->b": 0.0, "b->a": 1.0}), content({"a->b": 0.4, "b->a": 1.0}, 1)],
            "worse": [content({"a->b": -1.0, "b->a": 0.5}), content({"a->b": -1.0, "b->a": 0.1}, 1)],
            "other": [content({"a->b": 0.1, "b->a": 0.9}), content({"a->b": 0.3, "b->a": 1.1}, 1)]}


def test_a_subjects_value_is_its_mean_over_seeds_and_rows_are_compared_on_it(found):
    lines = {(line["row"], line["task"], line["metric"]): line for line in tables.compare(TABLE, found, PAPER, "M")}
    full, worse = lines["full", "a->b", "psnr"], lines["worse", "a->b", "psnr"]
    ours = (20 + NOISE + 20.4 + 1.4 * NOISE) / 2                                            # by hand, both seeds
    assert full["values"]["s2"] == pytest.approx(ours[2]) and full["mean"] == pytest.approx(ours.mean())
    assert full["seeds"] == pytest.approx([20 + NOISE.mean(), 20.4 + 1.4 * NOISE.mean()])
    theirs = np.full(8, 19.0)
    assert worse["difference"] == pytest.approx((theirs - ours).mean()) and worse["difference"] < 0
    assert worse["p"] == pytest.approx(stats.wilcoxon(theirs - ours).pvalue)
    assert "p" not in full and full["paper"] == 25.25 and worse["paper"] is None and worse["flags"] == "--M 10 --no-stage2"


def test_the_mean_over_tasks_is_taken_subject_by_subject(found):
    line = next(x for x in tables.compare(TABLE, found, PAPER, "M") if (x["row"], x["task"], x["metric"]) == ("other", "mean", "psnr"))
    by_hand = np.mean([20 + o + NOISE * (1 + o) for o in (0.1, 0.9, 0.3, 1.1)], axis=0)
    assert [line["values"][s] for s in SUBJECTS] == pytest.approx(by_hand.tolist())


def test_p_values_are_corrected_over_the_rows_of_the_table(found):
    lines = [x for x in tables.compare(TABLE, found, PAPER, "M") if x["task"] == "a->b" and x["metric"] == "psnr" and "p" in x]
    assert [x["row"] for x in lines] == ["worse", "other", "copy"]
    assert [x["p_holm"] for x in lines] == metrics.holm([x["p"] for x in lines])
    smallest = min(lines, key=lambda x: x["p"])
    assert smallest["p_holm"] == pytest.approx(min(1, 3 * smallest["p"]))


def test_methods_of_others_show_the_papers_number_only(found):
    lines = [x for x in tables.compare(TABLE, found, PAPER, "M") if x["row"] == "Theirs"]
    assert [(x["kind"], x["metric"], x["paper"]) for x in lines] == [("paper only", "psnr", 21.5), ("paper only", "ssim", 0.9)]


def test_markdown_and_csv_show_ours_theirs_and_the_test(found):
    lines = tables.compare(TABLE, found, PAPER, "M")
    text = tables.markdown("table9", TABLE, lines, found["full"], 0, ["M"])
    cells = {row.split(" | ")[0].strip("| "): row for row in text.splitlines() if row.startswith("| ")}
    full = next(x for x in lines if (x["row"], x["task"], x["metric"]) == ("full", "a->b", "psnr"))
    assert f"{full['mean']:.2f} ± {full['std']:.2f} / " in cells["full"] and "(25.25 / 0.912)" in cells["full"]
    assert "(21.50 ± 1.00 / 0.900 ± 0.020)" in cells["Theirs"] and "`--M 10 --no-stage2`" in cells["worse"] and "15.00 ± 0.00 / 0.500 ± 0.000" in cells["copy"]
    assert "8 test subjects; 2 training seeds" in text and "digital phantoms" in text and "3 comparisons" in text and "flags: --M 400." in text
    assert "cannot fall below 0.023" in text                                                # 3 x 2 / 2^8
    worse = next(x for x in lines if (x["row"], x["task"], x["metric"]) == ("worse", "mean", "psnr"))
    assert f"{worse['difference']:+.2f} dB, p = {worse['p_holm']:.2g}" in cells["worse"]
    read = list(csv.DictReader(io.StringIO(tables.as_csv(lines))))
    assert len(read) == len(lines)
    row = next(r for r in read if (r["row"], r["task"], r["metric"]) == ("full", "a->b", "psnr"))
    assert float(row["mean"]) == full["mean"] and float(row["ci95_low"]) == full["ci95"][0] and float(row["paper"]) == 25.25
    theirs = next(r for r in read if (r["row"], r["metric"]) == ("Theirs", "ssim"))
    assert (theirs["paper"], theirs["paper_std"]) == ("0.9", "0.02") and row["paper_std"] == ""
    assert [float(s) for s in row["seeds"].split()] == pytest.approx(full["seeds"], abs=1e-4)


def test_a_table_may_be_judged_by_dice(found):
    table, dice = {**TABLE, "metric": "dice"}, dict(zip(SUBJECTS, 0.5 + NOISE / 100))
    for row, shift in (("full", 0.0), ("worse", -0.125), ("other", 0.01)):
        for content in found[row]:
            content["rows"] += [metrics.row(task, "M", "dice", {s: v + shift for s, v in dice.items()}) for task in ("a->b", "b->a")]
            content["rows"] += [metrics.row(task, "real slices", "dice", {s: v + 0.25 for s, v in dice.items()}) for task in ("a->b", "b->a")]
    text = tables.markdown("fig6", table, tables.compare(table, found, PAPER, "M"), found["full"], 0, ())
    assert "mean Dice" in text and "/ Dice, mean of the classes" in text and "-0.125, p = " in text and "dB, p" not in text
    line = next(line for line in text.splitlines() if line.startswith("| real slices"))
    assert "/ 0.762" in line and "+0.250" in line
    assert "for the 3 comparisons" in text                      # worse, other, real slices: the copied source has no Dice


# ---- reports, and metrics of whole sets ------------------------------------------------------------------------------


ROUGE = dict(zip(SUBJECTS, 0.3 + NOISE / 100))


def told(shift=0.0, images=True, seed=0):
    """A results.json of MedM2G: reports with BLEU of all together, X-rays with FD, and findings that tables do not show."""
    rows = [metrics.row("xray->text", "M", "bleu4", {"all reports": 0.2 + shift}, unit="set"),
            metrics.row("xray->text", "M", "rouge", {s: v + shift for s, v in ROUGE.items()}),
            metrics.row("xray->text", "M", "lesion", dict.fromkeys(SUBJECTS, 1.0)),
            metrics.row("xray->text", "random report", "rouge", dict.fromkeys(SUBJECTS, 0.1)),
            metrics.row("text+xray", "M", "same lesion", {"all patients": 0.7}, unit="set"),
            metrics.row("text+xray", "strangers", "same lesion", {"all patients": 0.5}, unit="set")]
    if images:
        rows += [metrics.row("text->xray", "M", "psnr", dict(zip(SUBJECTS, 20 + NOISE))),
                 metrics.row("text->xray", "M", "ssim", dict.fromkeys(SUBJECTS, 0.5)),
                 metrics.row("text->xray", "M", "fd", {"all images": 8.0 + 10 * shift}, unit="set"),
                 metrics.row("text->xray", "M", "niqe", {s: 4 + v for s, v in zip(SUBJECTS, NOISE)})]
    return {"rows": rows, "protocol": "1 slice", "phantom": True, "data": "data/x", "config": {"M": 400}, "seed": seed}


def page_of(metric, found, paper=None):
    """The Markdown of a table of two rows -> (text, {row: its cells})."""
    table = {**TABLE, "metric": metric, "rows": {"full": {}, "other": {"rounds": ("text-xray", "ct-mri")}}}
    lines = tables.compare(table, found, paper or {}, "M")
    text = tables.markdown("t", table, lines, found["full"], 0, ())
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")]
    return text, {row[0]: row[1:] for row in rows}


def test_reports_are_compared_by_rouge_and_bleu_stands_beside_it_without_a_test():
    paper = {"full": {"xray->text": {"bleu4": 0.142, "bleu4_std": 0.01, "rouge": 0.309, "rouge_std": 0.009}},
             "R2Gen": {"xray->text": {"bleu4": 0.103, "rouge": 0.277}}}
    text, rows = page_of("rouge", {"full": [told(images=False)], "other": [told(0.05, images=False)]}, paper)
    values = np.array(list(ROUGE.values()))
    assert rows["row"] == ["flags", "xray->text", "mean ROUGE-L", "difference"]         # no column for text+xray
    assert list(rows) == ["row", "---", "R2Gen", "full", "other", "random report"]      # no row for strangers
    assert rows["full"][1] == (f"ROUGE-L {values.mean():.3f} ± {values.std():.3f} (ROUGE-L 0.309 ± 0.009) "
                               "/ BLEU-4 0.200 (BLEU-4 0.142 ± 0.010)")
    assert rows["R2Gen"][1] == "(ROUGE-L 0.277) (BLEU-4 0.103)"
    assert rows["other"][0] == "`--rounds text-xray,ct-mri`" and rows["other"][3] == "+0.050, p = 0.016"
    assert rows["full"][2].startswith(f"{values.mean():.3f} [") and rows["random report"][1] == "ROUGE-L 0.100 ± 0.000"
    assert "\n\nROUGE-L ± std / BLEU-4; in brackets what the paper prints, for its own data.  " in text
    assert "One number for all test subjects together, without std and test: BLEU-4.  Mean: over the tasks, with a 95 %" in text
    assert "PSNR" not in text and "lesion" not in text and "8 test subjects" in text and "for the 2 comparisons" in text


def test_a_table_judged_by_one_number_for_all_has_no_test():
    paper = {"full": {"text->xray": {"fd": 0.48}}}
    found = {"full": [told(), told(0.05, seed=1)], "other": [told(-0.1), told(-0.1, seed=1)]}
    text, rows = page_of("fd", found, paper)
    assert rows["row"][1:] == ["xray->text", "text->xray", "mean FD", "difference"]
    mean, spread = 20 + NOISE.mean(), NOISE.std()
    assert rows["full"][2] == (f"{mean:.2f} ± {spread:.2f} / 0.500 ± 0.000 / FD 8.25 (FD 0.48) "
                               f"/ NIQE {4 + NOISE.mean():.2f} ± {spread:.2f}")
    assert rows["full"][3:] == ["8.25; 8.00, 8.50", ""]
    assert rows["other"][3:] == ["7.00; 7.00, 7.00", "-1.25, one number for all, no test"]
    assert "PSNR in dB ± std over subjects / SSIM ± std / ROUGE-L ± std / BLEU-4 / FD, smaller is better / NIQE ± std, smaller" in text
    assert "without std and test: BLEU-4, FD.  Mean: over the tasks, and the mean of each seed.  Difference of that mean to \"full\"." in text
    for word in ("bootstrap", "Wilcoxon", "cannot fall", "None", "nan"):
        assert word not in text, word


def test_the_csv_of_a_table_has_every_metric_and_no_p_for_a_set():
    lines = tables.compare({**TABLE, "rows": {"full": {}, "other": {}}}, {"full": [told()], "other": [told(0.05)]}, {}, "M")
    read = {(r["row"], r["metric"]): r for r in csv.DictReader(io.StringIO(tables.as_csv(lines))) if r["task"] != "mean"}
    assert float(read["other", "fd"]["mean"]) == 8.5 and read["other", "fd"]["p"] == "" and read["other", "fd"]["n"] == "1"
    assert float(read["other", "fd"]["difference"]) == 0.5 and float(read["other", "rouge"]["p"]) < 0.05
    assert ("full", "same lesion") in read
    marked = {line["metric"] for line in lines if line.get("unit") == "set"}
    assert marked == {"bleu4", "fd", "same lesion"}


@pytest.mark.parametrize("name", list(TABLES_MEDM2G))
def test_every_table_of_medm2g_becomes_a_page(name):
    """Results are made up for the tasks of the table: the paper's own numbers, for six subjects or for all together."""
    table = TABLES_MEDM2G[name]
    rows = []
    for task, printed in table["paper"].get("MedM2G", {"ct->t2": {"psnr": 25.0, "ssim": 0.9}}).items():
        for metric, value in printed.items():
            if metric.endswith("_std"):
                continue
            one = metric.startswith("bleu") or metric == "fd"
            values = {"all": value} if one else dict.fromkeys(SUBJECTS[:6], value)
            rows.append(metrics.row(task, "M", metric, values, **({"unit": "set"} if one else {})))
    found = {row: [{"rows": rows, "protocol": "p", "phantom": False, "data": "d", "config": {}, "seed": 0}] for row in table["rows"]}
    lines = tables.compare(table, found, table["paper"], "M")
    text = tables.markdown(name, table, lines, found[table["against"]], 0, ())
    assert "None" not in text and "nan" not in text
    shown = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in shown}) == 1
    for row, tasks in table["paper"].items():
        for task in tasks:
            for metric, digits in (("psnr", 2), ("fd", 2), ("rouge", 3), ("bleu4", 3), ("niqe", 2), ("msssim", 3)):
                if metric in tasks[task]:
                    assert f"{tasks[task][metric]:.{digits}f}" in next(line for line in shown if line.startswith(f"| {row} |"))


def test_the_rows_of_medm2g_fit_its_config_and_the_papers_tables():
    paper = {name: table["paper"] for name, table in TABLES_MEDM2G.items() if table["paper"]}
    assert list(paper) == ["table1", "table1b", "table2", "table2b", "table3", "table3b", "table3c", "table3d", "table4", "table4b",
                           "table4c", "table5", "table5b", "table6", "table6b", "table7", "table9"]
    fields = {f.name for f in dataclasses.fields(medm2g.Config)}
    streams = ("text", *CONTRASTS)
    for name, table in TABLES_MEDM2G.items():
        assert table["against"] in table["rows"] and table["metric"] in MEASURES
        for row, changes in table["rows"].items():
            assert set(changes) <= fields, (name, row)
            for preset in medm2g.PRESETS.values():
                cfg = dataclasses.replace(medm2g.Config(**preset), **changes)
                for field, value in changes.items():
                    assert type(value) is type(getattr(medm2g.Config(), field)), (name, row, field)
            if "only" in changes:                           # the paper's tasks are those that are scored, in the same words
                scored = ["+".join(known) + "->" + "+".join(made) for known, made in named_directions(cfg.only, streams)]
                assert scored == list(paper[name][row]), name
                kinds = {medm2g.modality_of(stream) for stream in cfg.only[0].replace(":", "+").split("+")}
                assert {frozenset(pair.split("-")) for pair in cfg.rounds} == {frozenset(kinds)}, name
        if name in paper:
            assert table["against"] == "MedM2G" and set(table["rows"]) <= set(paper[name]), name
            assert table["metric"] in next(iter(paper[name]["MedM2G"].values())) or name in ("table7", "table9")
    assert {name for name, table in TABLES_MEDM2G.items() if len(table["rows"]) > 1 and name in paper} == {"table7"}
    assert TABLES_MEDM2G["table7"]["rows"]["CA+VI"] == {"lcag": False} and TABLES_MEDM2G["table7"]["rows"]["MedM2G"] == {}
    assert TABLES_MEDM2G["rounds"]["rows"]["star"]["rounds"] == ("text-xray", "text-ct", "text-mri", "ct-mri")
    assert paper["table2"]["MedM2G"]["flair+t1ce+t2->t1"] == {"psnr": 29.89, "psnr_std": 2.26, "ssim": 0.9536, "ssim_std": 0.0143}
    assert paper["table6b"]["MedM2G"]["t1->ct"]["psnr"] == 26.94 and paper["table7"]["none"]["text->xray"] == {"fd": 8.3}
    assert paper["table3d"]["MedM2G"] == {"text->xray": {"fd": 0.48}} and paper["table1"]["Kiut"]["xray->text"]["rouge"] == 0.409
    assert {field for stage in medm2g.STAGES.values() for field in stage} <= fields - set(medm2g.SAMPLING)
    assert set(medm2g.SAMPLING) <= fields


def test_too_few_subjects_are_said_to_be_too_few(found):
    few = {row: [{**c, "rows": [{**r, "values": dict(list(r["values"].items())[:4])} for r in c["rows"]]} for c in contents]
           for row, contents in found.items()}
    lines = tables.compare(TABLE, few, PAPER, "M")
    text = tables.markdown("t", TABLE, lines, few["full"], 0, [])
    assert "n = 4, too few to test" in text and "4 test subjects" in text


def test_many_tasks_become_lines(found):
    wide = {row: [content({f"{k}->x": 0.0 for k in range(9)})] for row in found}
    lines = tables.compare(TABLE, wide, {}, "M")
    text = tables.markdown("t", TABLE, lines, wide["full"], 0, [])
    lines = text.splitlines()
    assert "| row | full | worse | other | copy |" in lines and sum(line.startswith(("| 0->x |", "| 8->x |", "| mean PSNR |", "| difference |")) for line in lines) == 4
    assert "| flags |  | `--M 10 --no-stage2` | `--prior zero` |  |" in lines


def test_only_stages_before_the_first_difference_are_taken_over():
    stages = {"encoder": (), "mif": ("mif_epochs",), "codebook": (), "diffusion": ("steps", "mif")}
    assert tables.unaffected(stages, {"steps": 3}) == ["encoder", "mif", "codebook"]
    assert tables.unaffected(stages, {"mif": "zero", "mif_epochs": 0}) == ["encoder"]
    assert tables.unaffected(stages, {"size": 3}) == tables.unaffected(stages, {"steps": 1, "size": 3}) == []
    assert tables.unaffected(stages, {}) == []                                             # another seed: nothing can be shared


# ---- finished runs side by side ------------------------------------------------------------------


def a_run(folder, method, tasks, subjects=tuple(SUBJECTS), **changes):
    """A run folder with the results of a method and of a baseline; the truth of every picture is the same."""
    folder.mkdir(parents=True)
    rows = []
    for task, offset in tasks.items():
        psnr = {s: 20 + offset + NOISE[SUBJECTS.index(s)] * (1 + offset) for s in subjects}
        for name, values in ((method, psnr), ("copy", dict.fromkeys(subjects, 15.0))):
            rows.append(metrics.row(task, name, "psnr", values))
            rows.append(metrics.row(task, name, "ssim", {s: v / 200 for s, v in values.items()}))
    said = {"rows": rows, "protocol": "2 slices", "phantom": True, "data": "data/x", "config": {"M": 400}, "seed": 3,
            "fingerprint": "f", **changes}
    (folder / "results.json").write_text(json.dumps(said), encoding="utf-8")
    images = {}
    for task in tasks:
        images[f"{task}|{method}"] = np.full((16, 16), 0.5, np.float16)
        images[f"{task}|truth"] = np.full((16, 16), changes.get("seed", 3) / 8, np.float16)
    np.savez(folder / "results.npz", **images)
    return folder


def compared(capsys, *words):
    """What `python -m common.tables` would print: (exit status, output, errors)."""
    status = 0
    try:
        cli.as_command(lambda: tables.main([str(word) for word in words]))
    except SystemExit as end:
        status = end.code
    seen = capsys.readouterr()
    return status, seen.out, seen.err


def test_runs_of_different_scripts_are_compared_on_what_they_share(tmp_path, capsys):
    one = a_run(tmp_path / "one", "APT", {"a->b": 0.0, "b->a": 0.5})
    two = a_run(tmp_path / "two", "MetaDB", {"a->b": 1.0, "c->a": 0.5}, SUBJECTS[1:])
    status, out, err = compared(capsys, one, two, "--out", tmp_path / "tables")
    assert status == 0 and err == ""
    here = NOISE[1:]
    gap = (1 + here).mean()
    p = stats.wilcoxon(1 + here).pvalue
    copied = stats.wilcoxon(-5 - here).pvalue
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert table[0] == "| row | a->b | mean PSNR | difference |" and len(table) == 5
    assert table[2].startswith(f"| one (APT) | {20 + here.mean():.2f} ± {here.std():.2f} / {(20 + here).mean() / 200:.3f} ± ")
    assert table[3].startswith(f"| two (MetaDB) | {21 + 2 * here.mean():.2f} ± {2 * here.std():.2f} / ")
    assert table[3].endswith(f"| {gap:+.2f} dB, p = {metrics.holm([p, copied])[0]:.2g} |")
    assert table[4].startswith("| copy | 15.00 ± 0.00 / 0.075 ± 0.000 | ")
    text = (tmp_path / "tables" / "runs.md").read_text(encoding="utf-8")
    assert text in out and {p.name for p in (tmp_path / "tables").iterdir()} == {"runs.md", "runs.csv", "runs.png"}
    assert text.startswith("## runs: finished runs on the test subjects that they share\n\nData: x, digital phantoms; 7 test subjects.  2 slices.\n")
    assert 'Difference of that mean to "one (APT)"' in text
    for word in ("None", "nan", "flags", "paper", "seed", "Notice"):
        assert word not in text, word


def test_runs_of_equal_folder_names_stay_apart_and_other_data_are_said(tmp_path, capsys):
    one = a_run(tmp_path / "a" / "run", "APT", {"a->b": 0.0})
    two = a_run(tmp_path / "b" / "run", "APT", {"a->b": 1.0}, fingerprint="g", data="data/y", protocol="3 slices", seed=4)
    status, out, _ = compared(capsys, one, two, "--out", tmp_path / "out")
    assert status == 0 and "| run (APT) | " in out and f"| {two}, run (APT) | " in out
    assert "was evaluated on other data than run (APT) (data/y and data/x)" in out and "was scored in another way: 3 slices." in out
    shown = tables._same_slices({"one": {"a|truth": np.zeros(2), "a|model": 1, "b|truth": 2}, "two": {"a|truth": np.ones(2), "a|model": 2}}, {"a"})
    assert list(shown["one"]) == ["a|truth", "a|model"] and shown["two"] == {}            # another slice is not drawn beside it


def test_runs_that_cannot_be_compared_are_refused_in_one_line(tmp_path, capsys):
    one = a_run(tmp_path / "one", "APT", {"a->b": 0.0})
    other = a_run(tmp_path / "other", "APT", {"b->a": 0.0})
    broken = a_run(tmp_path / "broken", "APT", {"a->b": 0.0})
    (broken / "results.npz").unlink()
    empty = a_run(tmp_path / "empty", "APT", {})
    for words, status, message in [
            ([one, tmp_path / "none"], 1, "does not exist; run the script with --evaluate --out"),
            ([one, other], 1, "share no task and test subject"), ([one, broken], 1, "results.npz is damaged or no .npz file (FileNotFoundError"),
            ([one, empty], 1, "lacks rows or parts of rows"), ([one, one], 2, "is named twice"),
            ([one], 2, "two or more run folders are needed"), ([], 2, "RUN")]:
        found, out, err = compared(capsys, *words)
        assert found == status and message in err and out == ""
        assert err.count("\n") == 1 or "usage:" in err


@dataclasses.dataclass(frozen=True)
class Fake:
    steps: int = 5
    M: int = 400
    missing: tuple = ("each",)
    rounds: tuple = ("a-b",)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError("steps must be positive")


@pytest.fixture
def rehearsal(tmp_path):
    """reproduce() with a work() that only leaves files behind; returns (start, list of what was trained or scored)."""
    ran = []
    args = argparse.Namespace(out=tmp_path / "out", data=tmp_path / "data", seed=3, seeds=2, evaluate=True)
    method = SimpleNamespace(name="M", sampling=("M", "missing"), stages={"one": (), "two": ("steps",)})
    table = {"title": "t", "against": "full", "paper": {}, "rows": {"full": {}, "M": {"M": 100}, "short": {"steps": 2}}}

    def work(cfg, args):
        out = args.out.relative_to(tmp_path).as_posix()
        taken = sorted(read_checkpoint(args.out / "last.pt")["stages"]) if (args.out / "last.pt").exists() else []
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"results_{cfg.M}.json"
        if not args.evaluate:
            ran.append((cfg.steps, cfg.M, args.seed, out, taken))
            stages = {s: {"step": 1, "total": 1, "finished": True, "parts": {}} for s in ("one", "two")}
            torch.save({"format": 1, "script": "m", "config": {}, "seed": 0, "about": {}, "stages": stages}, args.out / "last.pt")
        elif not path.exists():
            ran.append((cfg.steps, cfg.M, args.seed, out, "scored"))
            path.write_text(json.dumps({**content({"a->b": 0.1 * cfg.M}, args.seed), "config": vars(cfg)}))
            images = {"a->b|M": np.zeros((16, 16)), "a->b|truth": np.ones((16, 16))} if cfg.steps < 9 else {}
            np.savez(path.with_suffix(".npz"), **images)
        return path

    def start(rows=table["rows"], **changes):
        tables.reproduce(method, "t", {**table, "rows": rows}, Fake(), argparse.Namespace(**{**vars(args), **changes}), work)
    return start, ran


def test_each_model_is_trained_once_under_its_own_flags_and_serves_all_rows_that_it_can(rehearsal):
    """The model of a folder is trained with the base's sampling flags, whatever row comes first."""
    start, ran = rehearsal
    start()
    assert ran == [(5, 400, 3, "out", []), (5, 400, 3, "out", "scored"), (5, 100, 3, "out", "scored"),
                   (2, 400, 3, "out/rows/steps=2", ["one"]), (2, 400, 3, "out/rows/steps=2", "scored"),
                   (5, 400, 4, "out/rows/seed1", []), (5, 400, 4, "out/rows/seed1", "scored"), (5, 100, 4, "out/rows/seed1", "scored"),
                   (2, 400, 4, "out/rows/steps=2+seed1", ["one"]), (2, 400, 4, "out/rows/steps=2+seed1", "scored")]
    del ran[:]
    start()
    assert ran == []                                                                        # all was there
    start(seeds=3)
    assert [(seed, out) for _, _, seed, out, what in ran if what == "scored"] == [(5, "out/rows/seed2")] * 2 + [(5, "out/rows/steps=2+seed2")]


def test_a_row_of_sampling_flags_that_comes_first_does_not_become_the_model(rehearsal):
    start, ran = rehearsal
    start(rows={"M": {"M": 100}, "full": {}}, seeds=1)
    assert ran == [(5, 400, 3, "out", []), (5, 100, 3, "out", "scored"), (5, 400, 3, "out", "scored")]


def test_rows_may_differ_in_lists_of_words(rehearsal, tmp_path):
    """A list that is trained gives its folder a name that one could type; one for sampling needs no folder."""
    start, ran = rehearsal
    start(rows={"full": {}, "two": {"rounds": ("a-b", "c-d")}, "same": {"rounds": ("a-b",), "missing": ("t1", "t2"), "M": 100}}, seeds=1)
    assert [(out, what) for *_, out, what in ran] == [("out", []), ("out", "scored"), ("out", "scored"), ("out/rows/rounds=a-b,c-d", []),
                                                      ("out/rows/rounds=a-b,c-d", "scored")]
    text = (tmp_path / "out" / "tables" / "t.md").read_text(encoding="utf-8")
    assert "| two | `--rounds a-b,c-d` |" in text and "| same | `--rounds a-b --missing t1,t2 --M 100` |" in text


def test_a_table_without_images_has_no_picture(rehearsal, tmp_path, capsys):
    start, _ = rehearsal
    start(rows={"full": {"steps": 9}}, seeds=1)
    assert {p.name for p in (tmp_path / "out" / "tables").iterdir()} == {"t.md", "t.csv"}
    assert capsys.readouterr().out.endswith(".md, .csv\n")


def test_an_interrupted_table_goes_on_where_it_was(rehearsal, tmp_path):
    start, ran = rehearsal
    start(seeds=1)
    (tmp_path / "out" / "rows" / "steps=2" / "results_400.json").unlink()
    del ran[:]
    start(seeds=1)
    assert [(out, what) for *_, out, what in ran] == [("out/rows/steps=2", ["one", "two"]), ("out/rows/steps=2", "scored")]
    assert {p.name for p in (tmp_path / "out" / "tables").iterdir()} == {"t.md", "t.csv", "t.png"}


def test_rows_that_do_not_fit_the_typed_flags_are_refused_before_any_work(rehearsal):
    start, ran = rehearsal
    with pytest.raises(RunError, match="t, row short .--steps 0.: steps must be positive"):
        start(rows={"full": {}, "short": {"steps": 0}})
    assert ran == []


def test_flags_are_what_the_parser_reads():
    changes = dict(prior="noise", M=1000, stage2=False, missing=("t1", "t2"), alpha=0.0, paste="both")
    words = ["--data", "x", *tables.flags(changes).split()]
    cfg, _ = cli.parse(apt.Config, apt.PRESETS, [], apt.LIMITS, lambda folder: "demo", "", words)
    assert {k: getattr(cfg, k) for k in changes} == changes


def test_the_rows_of_metadb_fit_its_config_and_the_papers_tables():
    paper = {name: {"rows": table["paper"]} for name, table in TABLES_METADB.items() if table["paper"]}
    fields = {f.name for f in dataclasses.fields(metadb.Config)}
    for name, table in TABLES_METADB.items():
        assert table["against"] in table["rows"]
        for changes in table["rows"].values():
            assert set(changes) <= fields and all(dataclasses.replace(metadb.Config(**preset), **changes) for preset in metadb.PRESETS.values())
        if name in paper:
            extra = set(paper[name]["rows"]) ^ set(table["rows"])
            assert extra == ({"DTF-Net", "DualDB"} if name.startswith("table2") else set()), name
    assert set(paper) <= set(TABLES_METADB)
    assert paper["table2a"]["rows"]["MetaDB"]["pd->t2"] == {"psnr": 34.42, "psnr_std": 1.17, "ssim": 0.9748, "ssim_std": 0.009}
    assert {field for stage in metadb.STAGES.values() for field in stage} <= fields - set(metadb.SAMPLING)


def test_the_rows_of_apt_fit_its_config_and_the_papers_tables():
    """Every row is a valid configuration; tables 1 to 7 need one model only; the paper's rows are ours, but for other methods."""
    paper = {name: {"rows": table["paper"]} for name, table in TABLES_APT.items() if table["paper"]}
    assert list(paper) == [f"table{n}" for n in range(1, 8)]
    for name, table in TABLES_APT.items():
        for row, changes in table.get("rows", {}).items():
            for preset in apt.PRESETS.values():
                dataclasses.replace(apt.Config(**preset), **changes)
            assert not name.startswith("table") or set(changes) <= set(apt.SAMPLING), (name, row)
        if "rows" in table:
            assert table["against"] in table["rows"]
        if name in paper:
            extra = set(paper[name]["rows"]) ^ set(table["rows"])
            assert extra == ({"MM-GAN", "HiNET", "ResViT", "ADM", "SynDiff", "M2DN"} if name == "table1" else set()), name
    assert paper["table2"]["rows"]["U+A"]["t1+t1ce+t2->flair"] == {"psnr": 25.09, "ssim": 0.915}
    assert paper["table7"]["rows"]["APT"]["pd->t1"] == {"psnr": 17.04, "ssim": 0.663}
    for field in (field for fields in apt.STAGES.values() for field in fields):
        assert field in {f.name for f in dataclasses.fields(apt.Config)} and field not in apt.SAMPLING


def test_the_model_as_configured_is_trained_before_the_others_and_rows_keep_their_order(rehearsal, tmp_path):
    start, ran = rehearsal
    start(rows={"short": {"steps": 2}, "full": {}}, seeds=1)
    assert [(out, what) for *_, out, what in ran] == [("out", []), ("out", "scored"), ("out/rows/steps=2", ["one"]), ("out/rows/steps=2", "scored")]
    lines = (tmp_path / "out" / "tables" / "t.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith(("| short", "| full"))] == ["| short", "| full"]
