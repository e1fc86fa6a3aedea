"""Efficient verification: who reads what, what is claimed, and that a killed verification changes nothing."""

import gc
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from transformers_minicpm4.data.ultraclean.verification import (
    BETTER,
    NO_DIFFERENCE,
    WORSE,
    Mixture,
    Packed,
    VerificationReport,
    efficient_verification,
    last_complete_checkpoint,
    paired_difference,
    student_t_quantile,
)


WORDS = [f"w{number}" for number in range(24)]
EOS = len(WORDS)
TOY = {"steps": 6, "batch_size": 2, "block_length": 16, "learning_rate": 3e-3}


def toy_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*WORDS, "<eos>", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def toy_model(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {
        "vocab_size": EOS + 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes}))


def counting(documents: int, seed: int, step: int = 1) -> Dataset:
    """Documents that count up in steps, from a random word: what can be learned is the step."""
    generator = random.Random(seed)
    texts = []
    for _ in range(documents):
        first, length = generator.randrange(len(WORDS)), generator.randrange(5, 30)
        texts.append(" ".join(WORDS[(first + step * place) % len(WORDS)] for place in range(length)))
    return Dataset.from_dict({"text": texts})


def toy_data() -> tuple[Dataset, Dataset, dict[str, Dataset]]:
    """Base counts in fives, candidate in ones; held out are longer documents of both kinds."""

    def held_out(step):
        return Dataset.from_dict(
            {"text": [" ".join(WORDS[(first + step * k) % 24] for k in range(31)) for first in range(20)]}
        )

    return counting(60, 1, step=5), counting(40, 2), {"ones": held_out(1), "fives": held_out(5)}


def verify(output_dir, **changes) -> VerificationReport:
    base, candidate, evaluation = toy_data()
    arguments = {"model": toy_model(), "tokenizer": toy_tokenizer(), "base": base, "candidate": candidate}
    arguments |= {"evaluation": evaluation, "output_dir": output_dir, **TOY}
    arguments |= {"checkpoint_steps": 1000, **changes}
    return efficient_verification(**arguments)


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Every run of the Trainer begins with a garbage collection, half a run's time over the modules of a session."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished verification at toy size: its folder and report."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    return folder, verify(folder)


class Forbid(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        raise AssertionError("nothing may be trained")


class KillAt(TrainerCallback):
    """Ends the process at a step of a run, as a machine that fails does."""

    def __init__(self, run: str, step: int):
        self.run, self.step = run, step

    def on_step_end(self, args, state, control, **kwargs):
        if Path(args.output_dir).name == self.run and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class TestData:
    def packed(self, texts: list[list[int]], block_length: int) -> Packed:
        rows = [[*text, EOS] for text in texts]
        lengths = [len(row) for row in rows]
        largest = [max(row) for row in rows]
        return Packed(Dataset.from_dict({"input_ids": rows, "length": lengths, "largest": largest}), block_length)

    def test_blocks_are_the_documents_with_eos_between_them(self):
        generator = random.Random(0)
        texts = [[generator.randrange(EOS) for _ in range(generator.randrange(1, 40))] for _ in range(50)]
        packed = self.packed(texts, 7)
        joined = [token for text in texts for token in (*text, EOS)]
        blocks = packed.whole_blocks()
        assert [blocks[i]["input_ids"].tolist() for i in range(len(blocks))] == [
            joined[i : i + 7] for i in range(0, len(joined) - 6, 7)
        ]
        assert packed.counts["tokens_left_out"] == len(joined) % 7

    def test_every_epoch_reads_every_document_once_in_a_new_order(self):
        packed = self.packed([[number] * 3 for number in range(20)], 4)  # a document is a block
        mixture = Mixture(packed, None, 60, 18, seed=3)
        # The base arm reads its stream whole: the first 18 blocks in the candidate's places, the rest in the others.
        stream = sorted(mixture[p]["input_ids"][0] for p in range(60))
        assert stream == sorted(list(range(20)) * 3)
        order = packed.order(3, 60)
        assert [sorted(order[e : e + 20].tolist()) for e in (0, 20, 40)] == [list(range(20))] * 3
        assert order[:20].tolist() != order[20:40].tolist()

    @pytest.mark.parametrize("blocks, replaced", [(10, 3), (97, 29), (40, 40), (1000, 1)])
    def test_share_is_exact_to_a_block_after_every_step(self, blocks, replaced):
        base, candidate = self.packed([[0] * 3] * 30, 4), self.packed([[1] * 3] * 30, 4)
        mixture = Mixture(base, candidate, blocks, replaced, seed=0)
        taken = 0
        for place in range(blocks):
            tokens = set(mixture[place]["input_ids"].tolist()) - {EOS}
            assert tokens in ({0}, {1})
            taken += tokens == {1}
            assert abs(taken - (place + 1) * replaced / blocks) < 1
        assert taken == replaced

    def test_arms_differ_in_the_replaced_blocks_alone(self):
        base = self.packed([[number % EOS] * (number % 5 + 1) for number in range(70)], 4)
        candidate = self.packed([[23] * 3] * 9, 4)
        ours, theirs = Mixture(base, None, 50, 15, seed=1), Mixture(base, candidate, 50, 15, seed=1)
        for place in range(50):
            if theirs.is_replaced(place):
                assert theirs[place]["input_ids"].tolist() == [23, 23, 23, EOS]
            else:
                assert ours[place]["input_ids"].tolist() == theirs[place]["input_ids"].tolist()

    def test_seeds_order_the_documents_differently(self):
        packed = self.packed([[number] for number in range(24)], 2)
        first, second, again = (
            [Mixture(packed, None, 20, 6, seed)[p]["input_ids"].tolist() for p in range(20)] for seed in (0, 1, 0)
        )
        assert first == again != second


class TestStatistics:
    # Fisher's table as every textbook prints it.
    @pytest.mark.parametrize(
        "probability, degrees, value",
        [
            (0.975, 1, 12.706),
            (0.975, 2, 4.303),
            (0.975, 4, 2.776),
            (0.975, 9, 2.262),
            (0.975, 30, 2.042),
            (0.95, 3, 2.353),
            (0.995, 5, 4.032),
            (0.9995, 2, 31.599),
            (0.75, 29, 0.683),
            (0.5, 7, 0.0),
        ],
    )
    def test_student_quantiles_equal_the_printed_table(self, probability, degrees, value):
        assert student_t_quantile(probability, degrees) == pytest.approx(value, abs=6e-4)

    def test_student_quantiles_equal_scipy(self):
        stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
        for degrees in range(1, 32):
            for probability in (0.6, 0.9, 0.975, 0.99, 0.9975):
                expected = stats.t.ppf(probability, degrees)
                assert student_t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9)

    def test_worked_example(self):
        mean, error, (low, high), verdict = paired_difference([5.0, 5.1, 5.2], [4.9, 5.0, 5.04], 0.95)
        assert mean == pytest.approx(-0.12)
        assert error == pytest.approx(0.02)
        assert (low, high) == pytest.approx((-0.12 - 4.30265 * 0.02, -0.12 + 4.30265 * 0.02), abs=1e-6)
        assert verdict == BETTER
        assert paired_difference([4.9, 5.0, 5.04], [5.0, 5.1, 5.2], 0.95)[3] == WORSE
        assert paired_difference([5.0, 5.1, 5.2], [4.9, 5.0, 5.04], 0.99)[3] == NO_DIFFERENCE

    def test_noise_is_called_a_difference_as_rarely_as_promised(self):
        generator = random.Random(0)
        claims = 0
        for _ in range(4000):
            seeds = [generator.gauss(5, 0.1) for _ in range(3)]  # what both arms of a seed have in common
            arms = [[loss + generator.gauss(0, 0.01) for loss in seeds] for _ in range(2)]
            claims += paired_difference(*arms, 0.95)[3] != NO_DIFFERENCE
        assert claims / 4000 == pytest.approx(0.05, abs=0.012)

    def test_a_real_difference_is_found_under_a_larger_spread_of_seeds(self):
        generator = random.Random(1)
        found = 0
        for _ in range(200):
            seeds = [generator.gauss(5, 0.1) for _ in range(5)]
            base, candidate = ([loss + shift + generator.gauss(0, 0.005) for loss in seeds] for shift in (0, -0.02))
            found += paired_difference(base, candidate, 0.95)[3] == BETTER
        assert found > 190

    def test_without_any_spread_nothing_is_claimed(self):
        assert paired_difference([2.0, 2.0, 2.0], [1.5, 1.5, 1.5], 0.95)[3] == NO_DIFFERENCE


class TestVerification:
    def test_report_equals_the_losses_it_was_made_from(self, finished):
        folder, report = finished
        for name, result in report.domains.items():
            runs = {
                arm: [
                    json.loads((folder / "runs" / f"{arm}-seed{s}.json").read_text())["losses"][name]
                    for s in (0, 1, 2)
                ]
                for arm in ("base", "candidate")
            }
            assert (list(result.base), list(result.candidate)) == (runs["base"], runs["candidate"])
            assert result.difference == pytest.approx(
                statistics.mean(runs["candidate"]) - statistics.mean(runs["base"])
            )
            # Two domains: each interval holds at 97.5 %, so that both hold at 95 %.
            half = student_t_quantile(0.9875, 2) * result.standard_error
            assert result.interval == pytest.approx((result.difference - half, result.difference + half))
            assert name in report.summary
            assert f"| {name} |" in report.to_markdown()
        assert report.data["candidate"]["share"] == pytest.approx(0.3, abs=0.5 / 12)
        assert VerificationReport.from_dict(json.loads((folder / "report.json").read_text())) == report
        assert not (folder / "checkpoints" / "base-seed0").exists()
        assert not list(folder.rglob("*.partial*"))

    def test_losses_are_mean_nats_per_token_of_the_packed_text(self, finished):
        _, report = finished
        model, tokenizer = toy_model().eval(), toy_tokenizer()
        for name, domain in toy_data()[2].items():
            ids = [token for text in domain["text"] for token in (*tokenizer(text)["input_ids"], EOS)]
            blocks = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)
            with torch.no_grad():
                log_probs = model(blocks).logits.log_softmax(-1)[:, :-1]
            expected = -log_probs.gather(-1, blocks[:, 1:, None]).mean()
            assert report.domains[name].start == pytest.approx(expected.item(), rel=1e-5)

    def test_second_call_trains_nothing_and_reports_the_same(self, finished):
        folder, report = finished
        assert verify(folder, callbacks=[Forbid()]) == report

    def test_a_saved_checkpoint_is_the_model_it_was_saved_from(self, finished, tmp_path):
        folder, report = finished
        toy_model().save_pretrained(tmp_path)
        toy_tokenizer().save_pretrained(tmp_path)
        assert verify(folder, model=tmp_path, tokenizer=str(tmp_path), callbacks=[Forbid()]) == report

    def test_base_as_its_own_candidate_gives_equal_losses(self, tmp_path):
        base, _, _ = toy_data()
        model = toy_model()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        report = verify(tmp_path, model=model, candidate=base)
        for result in report.domains.values():
            assert result.base == result.candidate
            assert result.verdict == NO_DIFFERENCE
            assert result.difference == 0
            assert len(set(result.base)) == 3, "the seeds change nothing"
        home = report.domains["fives"]
        assert min(home.start - loss for loss in home.base) > 0.01, "nothing was trained"
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())

    def test_learning_rate_of_every_run_decays_from_the_peak_to_about_zero(self, tmp_path):
        rates = {}

        class Note(TrainerCallback):
            def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
                rates.setdefault(Path(args.output_dir).name, []).append(lr_scheduler.get_last_lr()[0])

        verify(tmp_path, callbacks=[Note()], decay_type="linear", warmup_steps=1)
        assert len(rates) == 6
        expected = [3e-3 * factor for factor in (0, 1, 0.8, 0.6, 0.4, 0.2)]
        assert all(run == pytest.approx(expected) for run in rates.values())

    def test_better_text_wins_where_it_is_better(self, tmp_path):
        report = verify(tmp_path, steps=25, batch_size=4, learning_rate=1e-2)
        assert report.domains["ones"].verdict == BETTER
        assert report.domains["ones"].difference < -0.1
        assert report.domains["fives"].difference > 0  # and costs a little where the base is at home
        assert report.summary.startswith("better: ones")

    def test_killed_verification_ends_as_an_undisturbed_one(self, finished, tmp_path):
        folder, report = finished
        kill = "t.KillAt('candidate-seed1', 4)"
        code = f"import test_verification as t; t.verify('out', callbacks=[{kill}], checkpoint_steps=3)"
        result = subprocess.run(
            [sys.executable, "-c", f"import torch; torch.set_num_threads(1); {code}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == -signal.SIGKILL, result.stderr
        out = tmp_path / "out"
        done = {path.stem for path in (out / "runs").iterdir()}
        assert done == {"start", "base-seed0", "candidate-seed0", "base-seed1"}
        checkpoints = out / "checkpoints" / "candidate-seed1"
        assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-3"]
        # Killed while it saved: the newer checkpoint is half of one.
        shutil.copytree(checkpoints / "checkpoint-3", checkpoints / "checkpoint-4")
        (checkpoints / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')

        begun = []

        class Note(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                begun.append((Path(args.output_dir).name, state.global_step))

        again = verify(out, callbacks=[Note()], checkpoint_steps=3)
        assert begun[0] == ("candidate-seed1", 3)
        assert [run for run, step in begun if step == 0] == ["base-seed2", "candidate-seed2"]
        assert again == report  # to the last bit of every loss

    def test_killed_after_the_last_step(self, finished, tmp_path):
        """Trained to its end but not evaluated: nothing is trained again."""
        folder, report = finished

        class Stop(TrainerCallback):
            def on_evaluate(self, args, state, control, **kwargs):
                if state.global_step == TOY["steps"]:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            verify(tmp_path, callbacks=[Stop()])
        assert last_complete_checkpoint(tmp_path / "checkpoints" / "base-seed0").name == "checkpoint-6"
        begun = []

        class Note(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                begun.append(Path(args.output_dir).name)

        assert verify(tmp_path, callbacks=[Note()]) == report
        assert "base-seed0" not in begun

    def test_plot_needs_matplotlib_and_says_so(self, finished, tmp_path, monkeypatch):
        _, report = finished
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"pip install transformers_minicpm4\[data\]"):
            report.plot(tmp_path / "losses.png")

    def test_plot_has_a_panel_for_every_domain(self, finished, tmp_path, monkeypatch):
        figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
        folder, report = finished
        assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")
        seen = []
        monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **_: (seen.append(self), path.touch()))
        five = replace(report, domains={f"domain {n}": report.domains["ones"] for n in range(5)})
        five.plot(tmp_path / "losses.png")
        assert [axes.get_title().split("\n")[0] for axes in seen[0].axes] == list(five.domains)
        assert [path.name for path in tmp_path.iterdir()] == ["losses.png"]


class TestRefusals:
    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"seeds": (0, 1)}, "at least three"),
            ({"seeds": (0, 1, 1)}, "at least three different"),
            ({"steps": 0}, "at least 1"),
            ({"warmup_steps": 6}, "at least one step for the decay"),
            ({"candidate_share": 0.01}, "between one and all"),
            ({"candidate_share": 1.2}, "between one and all"),
            ({"confidence": 95}, "between 0 and 1"),
            ({"on_leak": "ignore"}, '"refuse" and "remove"'),
            ({"evaluation": {}}, "at least one domain"),
            ({"block_length": 64}, "32 positions"),
            ({"text_column": "content"}, "only text"),
            ({"training_arguments": {"seed": 7}}, "may not contain seed"),
            ({"training_arguments": {"gradient_accumulation_steps": 3}}, "multiple"),
            ({"model": toy_model(vocab_size=10)}, "id 24"),
            ({"candidate": Dataset.from_dict({"text": ["w1 w2"]})}, "candidate has 3 tokens"),
        ],
    )
    def test_arguments(self, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            verify(tmp_path / "out", callbacks=[Forbid()], **changes)
        # A mistake leaves no folder that refuses the corrected call.
        assert not list(tmp_path.rglob("runs/*.json"))

    def test_types(self, tmp_path):
        stream = IterableDataset.from_generator(lambda: iter([{"text": "w1"}]))
        with pytest.raises(TypeError, match="candidate is a IterableDataset"):
            verify(tmp_path, candidate=stream)
        with pytest.raises(TypeError, match="base, row 0: 'text' is a int"):
            verify(tmp_path, base=Dataset.from_dict({"text": [1, 2]}))

    def test_tokenizer_without_eos(self, tmp_path):
        tokenizer = toy_tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="no eos token"):
            verify(tmp_path, tokenizer=tokenizer)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"learning_rate": 1e-3}, r"learning_rate was 0\.003 and is now 0\.001"),
            ({"seeds": (0, 1, 2, 3)}, r"seeds was \[0, 1, 2\] and is now \[0, 1, 2, 3\]"),
            ({"candidate": counting(40, 3)}, "data of candidate was"),
            ({"training_arguments": {"weight_decay": 0.1}}, "training_arguments was {}"),
        ],
    )
    def test_folder_of_other_settings_or_data(self, finished, changes, message):
        folder, _ = finished
        with pytest.raises(ValueError, match=f"other settings or data: {message}"):
            verify(folder, callbacks=[Forbid()], **changes)

    def test_folder_of_other_weights_or_config(self, finished):
        weights, config = toy_model(), toy_model(rms_norm_eps=1e-3)
        with torch.no_grad():
            weights.lm_head.weight[0, 0] += 1e-3
        for model in (weights, config):
            with pytest.raises(ValueError, match=r"data: model was \w{8}\.\.\. and is now"):
                verify(finished[0], model=model, callbacks=[Forbid()])

    def test_leaked_documents_and_rows_without_text_are_left_out_and_counted(self, finished, tmp_path):
        _, report = finished
        base, candidate, evaluation = toy_data()
        copies = [candidate["text"][3], base["text"][5], candidate["text"][3]]
        leaked = {**evaluation, "ones": Dataset.from_dict({"text": [*copies, *evaluation["ones"]["text"]]})}
        with pytest.raises(ValueError, match="ones: 3 of 23 documents are also in base or candidate"):
            verify(tmp_path, evaluation=leaked)
        holes = Dataset.from_dict({"text": [None, "", *base["text"], " \n", None]})
        dirty = verify(tmp_path, base=holes, evaluation=leaked, on_leak="remove")
        assert dirty.domains == report.domains
        assert dirty.data["evaluation/ones"]["leaked"] == 3
        assert dirty.left_out == "base 2 null, base 2 blank, evaluation/ones 3 also trained on"
        assert dirty.left_out in dirty.to_markdown()
        assert dirty.data["base"]["skipped"] == {"null": 2, "blank": 2}
