"""`zoo compare`: its file, its rows, and a comparison from the first entry to the picture."""

import contextlib
import csv
import io
import json
import statistics

import pytest
import yaml

from zoo.cli import main
from zoo.commands import compare
from zoo.commands.compare_plot import arrange, box_of, labels
from zoo.commands.compare_report import cells, markdown, rows_of
from zoo.commands.comparison import merged, read_plan
from zoo.errors import UsageError

from .conftest import settings


def write(path, **content):
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def plan_file(tmp_path, recipe):
    def make(**content):
        given = {"recipe": recipe, "budget": {"seconds": 1}, "attentions": ["uniform", "softmax"]}
        return write(tmp_path / "small.yaml", **{k: v for k, v in {**given, **content}.items() if v is not None})

    return make


def test_entries_are_mechanisms_backbones_and_changes(plan_file):
    pool = {"model": {"init_args": {"attn": "softmax", "backbone_options": {"global_pool": "avg"}}}}
    plan = read_plan(plan_file(backbones=["zoo_shvit_s1"], entries={"pooled": pool}, attentions=["un*"], seeds=[2, 5]))
    assert [entry.name for entry in plan.entries] == ["uniform", "zoo_shvit_s1", "pooled"]
    assert "2210.08457" in plan.entries[0].paper
    assert plan.entries[0].confidence == "high"
    assert "2401.16456" in plan.entries[1].paper
    assert "1706.03762" in plan.entries[2].paper
    assert plan.overlay(plan.entries[2], 5) == pool | {"seed_everything": 5}


def test_an_entry_wins_over_the_settings_of_all():
    base = {"model": {"a": 1, "b": {"c": 2}}, "seed": 0}
    assert merged(base, {"model": {"b": {"d": 3}, "a": 4}}) == {"model": {"a": 4, "b": {"c": 2, "d": 3}}, "seed": 0}
    assert base["model"]["b"] == {"c": 2}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"attention": ["softmax"]}, "Did you mean 'attentions'"),
        ({"recipe": None}, "names no recipe"),
        ({"recipe": "quickstar"}, "Did you mean 'quickstart'"),
        ({"budget": None}, r"budget: None.*seconds: N"),
        ({"budget": {"seconds": 0}}, "N above 0"),
        ({"budget": {"hours": 3}}, r"gmacs: N"),
        ({"seeds": 3}, r"such as \[0, 1, 2\]"),
        ({"accuracy": "tset"}, "Did you mean 'test'"),
        ({"attentions": ["sofmax"]}, "Did you mean 'softmax'"),
        ({"backbones": ["zoo_vit_tiny"]}, "unknown backbone 'zoo_vit_tiny'"),
        ({"attentions": "softmax"}, "give patterns"),
        ({"attentions": None}, "compares nothing"),
        ({"entries": {"a/b": {}}}, "name of a folder"),
        ({"entries": {"a": 3}}, "give changes to the recipe"),
        ({"entries": {"a": {"model": {"init_args": {"attn": "sofmax"}}}}}, "Did you mean 'softmax'"),
    ],
)
def test_mistakes_in_the_file_are_named(plan_file, content, named):
    with pytest.raises(UsageError, match=named):
        read_plan(plan_file(**content))


def record(top1, **more):
    facts = {"val": {"top1": top1}, "parameters": 2_500_000, "gmacs": 0.25, "images_per_second": 100.0}
    return facts | {"peak_memory_gb": 1.0, "epochs_done": 2.0, "train_seconds": 5.0, **more}


def test_rows_hold_means_and_the_spread_of_seeds(plan_file):
    plan = read_plan(plan_file(attentions=["softmax", "uniform", "halo"], seeds=[0, 1, 2]))
    found = [0.5, 0.6, 0.4]
    records = {("softmax", seed): record(top1, images_per_second=seed) for seed, top1 in enumerate(found)}
    records |= {
        ("uniform", 0): record(0.7),
        ("uniform", 1): {"failed": "no memory"},
        ("halo", 0): {"failed": "why | not"},
    }
    rows = rows_of(plan, records)
    assert [row["name"] for row in rows] == ["uniform", "softmax", "halo"]
    assert rows[0]["spread"] is None
    assert rows[1]["accuracy"] == pytest.approx(50)
    assert rows[1]["spread"] == pytest.approx(100 * statistics.stdev(found), abs=0.005)
    assert rows[1]["images_per_second"] == 1.0
    assert cells(rows[1])[:8] == ["softmax", "50.00 ± 10.00", "3", "1", "0.250", "2.50", "1.00", "2.0"]
    assert cells(rows[2])[-1] == "failed: why | not"
    page = markdown(plan, rows, {"command": "zoo compare", "hardware": "a machine"})
    assert "why \\| not" in page
    assert "standard deviation" in page
    assert len({line.replace("\\|", "").count("|") for line in page.splitlines() if line.startswith("|")}) == 1


def test_points_at_one_place_share_a_label():
    found = labels([1.0, 5.0, 1.001, 3.0], [2.0, 2.0, 2.0, 9.0])
    assert found == [((1.0, 2.0), "1, 3"), ((5.0, 2.0), "2"), ((3.0, 9.0), "4")]
    assert labels([float("nan"), 1.0], [2.0, 2.0]) == [((1.0, 2.0), "2")]
    assert labels([1.0, 1.0], [2.0, 2.0]) == [((1.0, 2.0), "1, 2")]


def overlapping(one, other):
    return min(one[2], other[2]) - max(one[0], other[0]) > 1e-6 and min(one[3], other[3]) - max(one[1], other[1]) > 1e-6


def test_numbers_of_points_in_a_crowd_stay_apart():
    """30 dots in a corner of 80 x 100 points, where numbers above and beside their dots would lie on each other."""
    points = [(7.0 + 16 * (n % 5) + n / 7, 190.0 - 16 * (n // 5)) for n in range(30)]
    texts = [str(n + 1) for n in range(29)] + ["30, 31, 32"]
    inside = (0.0, 0.0, 300.0, 200.0)
    offsets = arrange(points, texts, points, inside)
    boxes = [box_of((x + dx, y + dy), text) for (x, y), (dx, dy), text in zip(points, offsets, texts, strict=True)]
    dots = [(x - 2, y - 2, x + 2, y + 2) for x, y in points]
    for number, box in enumerate(boxes):
        assert not any(overlapping(box, other) for other in (*boxes[:number], *dots))
        assert box[0] >= 0
        assert box[3] <= 200
    # A number alone stands beside its dot, and where there is no room at all the place is still some place.
    assert max(map(abs, arrange([(50.0, 50.0)], ["7"], [(50.0, 50.0)], inside)[0])) < 10
    assert len(arrange([(5.0, 5.0)] * 9, ["88, 99"] * 9, [(5.0, 5.0)], (0.0, 0.0, 10.0, 10.0))) == 9


@pytest.fixture
def in_process(monkeypatch):
    """Runs entries in this process, and keeps their command lines."""
    lines = []

    def call(arguments, log):
        lines.append(list(arguments))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(list(arguments))
        if status:
            raise (UsageError if status == 2 else compare._Failed)(err.getvalue().strip())
        return out.getvalue()

    monkeypatch.setattr(compare, "call", call)
    return lines


def test_trains_measures_and_goes_on(zoo, plan_file, in_process, tmp_path):
    wrong = {"model": {"init_args": {"attn": "softmax", "attn_options": {"num_heads": 3}}}}
    line = [
        "compare",
        "--config",
        str(plan_file(entries={"wrong": wrong}, accuracy="test")),
        "--trainer.accelerator",
        "cpu",
    ]
    one = zoo(*line, "--only", "uniform")
    assert one.status == 0, one.err
    assert "not trained yet" in one.out
    runs = tmp_path / "runs" / "small"
    facts = json.loads((runs / "uniform-seed0" / "record.json").read_text())
    # Up to what starting takes of the second; on busy cores a last step may take long, but never as long as no budget.
    assert 0.5 < facts["train_seconds"] < 20
    assert facts["attn"] == "uniform"
    assert [call[0] for call in in_process] == ["fit", "test"]
    assert in_process[1][-1] == "--trainer.accelerator=cpu"
    # What an interrupted comparison leaves of a run is not in the way.
    (runs / "softmax-seed0" / "checkpoints").mkdir(parents=True)
    rest = zoo(*line)
    assert rest.status == 0, rest.err
    assert "wrong, seed 0, failed" in rest.out
    assert "num_heads=3 does not divide 16" in rest.out
    assert len(in_process) == 5
    content = json.loads((runs / "comparison.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert content["budget"] == {"seconds": 1.0}
    for name in ("uniform", "softmax"):
        run = json.loads((runs / f"{name}-seed0" / "record.json").read_text())
        assert rows[name]["accuracy"] == pytest.approx(100 * run["test"]["top1"], abs=0.005)
        assert rows[name]["gmacs"] == run["gmacs"]
    # The block of uniform attention projects twice for one image, softmax attention 4 times for 5 tokens.
    assert rows["uniform"]["gmacs"] < rows["softmax"]["gmacs"]
    with open(runs / "comparison.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == [row["name"] for row in content["rows"]]
    assert "does not divide" in table[-1]["failed"]
    assert (runs / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "1706.03762" in (runs / "comparison.md").read_text()
    # Only what failed is tried again.
    again = zoo(*line)
    assert again.status == 0
    assert len(in_process) == 6
    # Why it failed is not forgotten where another entry is asked for.
    once_more = zoo(*line, "--only", "uniform")
    assert once_more.status == 0
    assert len(in_process) == 6
    assert "does not divide" in (runs / "comparison.csv").read_text()
    plan_file(entries={"wrong": wrong}, seeds=[0, 1])
    other = zoo(*line)
    assert other.status == 2
    assert "holds another comparison" in other.err


def test_a_budget_of_multiply_adds_is_a_number_of_steps(zoo, plan_file, in_process, recipe, tmp_path):
    """A budget of exactly 3 batches of 8 images, and a bit more."""
    with open(recipe) as file:
        each = compare.gmacs(merged(yaml.safe_load(file), {"model": {"init_args": {"attn": "uniform"}}}))
    done = zoo("compare", "--config", str(plan_file(attentions=["uniform"], budget={"gmacs": 3.5 * 8 * each})))
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "runs" / "small" / "uniform-seed0" / "record.json").read_text())["steps"] == 3


def test_a_network_that_cannot_be_counted_is_one_failed_entry(zoo, plan_file, in_process):
    wrong = {"model": {"init_args": {"attn": "softmax", "attn_options": {"num_heads": 3}}}}
    done = zoo(
        "compare", "--config", str(plan_file(attentions=["uniform"], entries={"wrong": wrong}, budget={"gmacs": 1e-4}))
    )
    assert done.status == 0, done.err
    assert "num_heads=3 does not divide 16" in done.out
    assert "uniform, seed 0: " in done.out


def test_multiply_adds_are_those_of_the_network(images):
    """One block of width 16 on 16 x 16 pixels in patches of 8: 4 tokens and the class token, by hand."""
    patches, tokens, width = 4, 5, 16
    embed = patches * (3 * 64) * width
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    mlp = 2 * tokens * width * 4 * width
    want = embed + attention + mlp + width * 10
    assert compare.gmacs(settings(images)) == pytest.approx(want / 1e9, abs=1e-6)


def test_mistakes_on_the_line(zoo, plan_file, tmp_path):
    assert "give a comparison" in zoo("compare").err
    assert "fits no entry" in zoo("compare", "--config", str(plan_file()), "--only", "nothing").err
    (tmp_path / "runs" / "full").mkdir(parents=True)
    (tmp_path / "runs" / "full" / "file").touch()
    assert "something else" in zoo("compare", "--config", str(plan_file()), "--run", "full").err


def test_nothing_that_could_be_trained_is_an_error(zoo, plan_file, in_process):
    done = zoo("compare", "--config", str(plan_file(attentions=["uniform"])), "--model.lrr", "3")
    assert done.status == 2
    assert "no entry could be trained" in done.err
    assert "Did you mean" in done.err


def test_a_mistake_that_all_entries_share_is_told_after_two(zoo, plan_file, in_process, tmp_path):
    plan = plan_file(attentions=["softmax", "uniform", "efficient"])
    done = zoo("compare", "--config", str(plan), "--data.root", str(tmp_path / "nowhere"))
    assert done.status == 2
    assert "the first two could not be trained for one reason" in done.err
    assert "nowhere" in done.err
    assert "3 of 3" not in done.out


def test_failures_alike_are_each_their_own(zoo, plan_file, monkeypatch):
    """Where two run out of memory a smaller one may not."""

    def call(arguments, log):
        raise compare._Failed("out of memory")

    monkeypatch.setattr(compare, "call", call)
    done = zoo("compare", "--config", str(plan_file(attentions=["softmax", "uniform", "efficient"])))
    assert "3 of 3" in done.out
    assert "no entry could be trained" in done.err


def test_what_failed_is_said_where_the_first_entry_was_not_asked_for(zoo, plan_file, in_process):
    done = zoo(
        "compare", "--config", str(plan_file(attentions=["softmax", "uniform"])), "--only", "uni*", "--data.x", "3"
    )
    assert done.status == 2
    assert "the first says: None" not in done.err
    assert "no entry could be trained; the first says: " in done.err


def test_the_accelerator_of_a_test_is_that_of_the_training():
    assert compare.accelerator(["--a", "b", "--trainer.accelerator", "cpu"]) == ["--trainer.accelerator=cpu"]
    assert compare.accelerator(["--trainer.accelerator=gpu", "--x"]) == ["--trainer.accelerator=gpu"]
    assert compare.accelerator(["--data.root", "x"]) == []


def test_the_shipped_comparison_covers_the_registry():
    from zoo.attention import list_attentions
    from zoo.resources import find_recipe

    plan = read_plan(find_recipe("compare/cifar10_attention"))
    assert [entry.name for entry in plan.entries] == list_attentions()
    assert plan.budget == ("seconds", 40.0)


def test_the_page_in_recipes_is_what_its_record_says():
    from zoo.commands.compare_report import markdown
    from zoo.resources import find_recipe

    path = find_recipe("compare/cifar10_attention")
    record = json.loads((path.parents[1] / "results" / "compare" / "cifar10_attention.json").read_text())
    table = markdown(read_plan(path), record["rows"], record)
    assert (path.parents[1] / "COMPARISON.md").read_text().startswith(table)


@pytest.mark.slow
def test_on_the_samples_in_processes_of_their_own(zoo, tmp_path):
    """As a user has it: nothing downloaded, two seconds for each of two mechanisms."""
    small = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    plan = write(
        tmp_path / "pair.yaml",
        recipe="quickstart",
        settings={"model": {"init_args": {"backbone_options": small}}, "data": {"init_args": {"num_workers": 0}}},
        budget={"seconds": 2},
        attentions=["softmax", "uniform"],
    )
    done = zoo("compare", "--config", str(plan))
    assert done.status == 0, done.err
    content = json.loads((tmp_path / "runs" / "pair" / "comparison.json").read_text())
    assert {row["name"] for row in content["rows"]} == {"softmax", "uniform"}
    for row in content["rows"]:
        assert row["seeds"] == 1
        assert 2 <= row["train_seconds"] < 20
    assert "$ zoo fit" in (tmp_path / "runs" / "pair" / "softmax-seed0.log").read_text()
