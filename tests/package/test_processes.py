"""Processes and threads around one model: forked, spawned, by DataLoader; none may hang.

Each case is a program of its own with a time limit, because what is tested is how it ends.
"""

import subprocess
import sys
import textwrap

import pytest
from torch.multiprocessing import get_all_start_methods

from bert_fast.bench import data

LIMIT = 60  # seconds; a hang takes for ever, a slow machine some seconds

COMMON = """
import multiprocessing, os, signal, sys, threading
import torch
import bert_fast

torch.set_num_threads(2)
torch.manual_seed(1)

def model(**options):
    config = bert_fast.BertConfig(
        vocab_size=100, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=512, **options)
    return bert_fast.BertModel(config, add_pooling_layer=False).eval()

ids = torch.arange(1, 2001).remainder(99).view(20, 100) + 1

@torch.no_grad()
def run(model):
    return model(ids).last_hidden_state

def in_child(work):
    "Whether work() returned true in a forked child, which is killed where it hangs."
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if work() else 3)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
"""


def program(text):
    code = COMMON + textwrap.dedent(text)
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT
    )
    assert said.returncode == 0, said.stderr


forked = pytest.mark.skipif(
    "fork" not in get_all_start_methods(), reason="this system does not fork"
)


@forked
def test_a_model_used_in_the_parent_runs_in_a_child():
    program("""
        plain, packed = model(), model().prepack()
        before = run(plain), run(packed)
        assert in_child(lambda: torch.equal(run(packed), before[1])) == 0
        assert in_child(lambda: torch.equal(run(plain), before[0])) == 0
        assert torch.equal(run(plain), before[0]) and torch.equal(run(packed), before[1])
    """)


@forked
def test_a_model_loaded_in_the_parent_runs_in_a_child(tmp_path):
    program(f"""
        model().save_pretrained({str(tmp_path)!r})
        loaded = bert_fast.BertModel.from_pretrained({str(tmp_path)!r}).eval()
        torch.rand(3000, 300) @ torch.rand(300, 3000)  # OpenMP has begun
        assert in_child(lambda: run(loaded).isfinite().all()) == 0
        assert in_child(lambda: run(loaded.prepack()).isfinite().all()) == 0
    """)


@forked
def test_a_child_keeps_its_threads():
    """torch's ops and ours run on as many threads in the child, and give the parent's bits."""
    program("""
        x = torch.randn(2000, 600)
        def results():
            return x.T @ x, torch.nn.functional.gelu(x), bert_fast.gelu(x)
        before = results()

        def work():
            after = results()
            assert torch.get_num_threads() == 2
            assert len(os.listdir("/proc/self/task")) > 1
            return all(map(torch.equal, after, before))

        assert in_child(work) == 0
        assert torch.get_num_threads() == 2
        assert all(map(torch.equal, results(), before))
    """)


@forked
def test_a_child_may_ask_for_threads_again():
    program("""
        before = torch.nn.functional.gelu(x := torch.randn(2000, 600)), bert_fast.gelu(x)

        def work():
            torch.set_num_threads(1)
            torch.set_num_threads(3)
            after = torch.nn.functional.gelu(x), bert_fast.gelu(x)
            return len(os.listdir("/proc/self/task")) > 1 and all(map(torch.equal, after, before))

        assert in_child(work) == 0
    """)


@forked
def test_openmp_that_cannot_end_its_threads():
    """As before GCC 9: the child has one thread, says so once, and does not hang."""
    program("""
        import warnings
        from bert_fast.backends import processes
        class Old:
            pass
        processes._gnu_openmp = lambda: iter([Old()])
        plain = model()
        before = run(plain)

        def work():
            assert torch.get_num_threads() == 1
            return torch.allclose(run(plain), before, rtol=0, atol=1e-5)

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert in_child(lambda: work() and len(said) == 1 and "'spawn'" in str(said[0])) == 0
        assert not said
        assert torch.get_num_threads() == 2
    """)


@forked
def test_a_server_that_loads_before_it_forks():
    """Several children of one parent, which itself goes on, all to the same bits: a model of
    transformers' that was accelerated, and torch's own layers."""
    program("""
        import transformers
        config = transformers.BertConfig(
            vocab_size=100, hidden_size=128, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=512)
        theirs = transformers.BertModel(config).eval()
        before = run(theirs)
        fast = bert_fast.accelerate(theirs)
        ours = run(fast)
        assert torch.allclose(ours, before, rtol=0, atol=1e-4)
        for _ in range(3):
            assert in_child(lambda: torch.equal(run(fast), ours)) == 0
            assert torch.equal(run(fast), ours)
    """)


@forked
def test_text_is_encoded_in_a_child(tmp_path):
    """The tokenizer has threads of its own, and says so where a fork ends them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    program(f"""
        model().save_pretrained({str(tmp_path)!r})
        loaded = bert_fast.SentenceEncoder({str(tmp_path)!r})
        texts = [" ".join("abcdefghij"[: 1 + i % 10]) for i in range(200)]
        assert in_child(lambda: loaded.encode(texts).shape == (200, 128)) == 0
        before = loaded.encode(texts)
        assert in_child(lambda: (loaded.encode(texts) == before).all()) == 0
        assert (loaded.encode(texts) == before).all()
    """)


@forked
def test_training_in_a_child():
    program("""
        trained = model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        def step():
            trained.zero_grad()
            trained(ids).last_hidden_state.square().mean().backward()
            return trained.layers[0].attention.qkv.weight.grad
        before = step().clone()
        assert in_child(lambda: torch.allclose(step(), before, rtol=1e-3, atol=1e-6)) == 0
    """)


@forked
def test_children_of_children():
    program("""
        packed = model().prepack()
        before = run(packed)
        assert in_child(lambda: in_child(lambda: torch.equal(run(packed), before)) == 0) == 0
    """)


@forked
def test_a_pool_of_forked_workers():
    program("""
        packed = model().prepack()
        before = run(packed)
        def work(i):
            return torch.equal(run(packed), before)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert all(pool.map_async(work, range(4)).get(timeout=40))
    """)


@forked
def test_a_data_loader_whose_workers_encode():
    program("""
        packed = model().prepack()
        before = run(packed)

        class Vectors(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, i):
                return run(packed)[i]

        loader = torch.utils.data.DataLoader(Vectors(), num_workers=2, timeout=40)
        assert torch.equal(torch.cat(list(loader)), before[:4])
    """)


@forked
def test_a_fork_while_other_threads_compute():
    program("""
        packed = model().prepack()
        before, stop, failed = run(packed), threading.Event(), []
        def work():
            while not stop.is_set():
                if not torch.equal(run(packed), before):
                    failed.append(1)
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        codes = [in_child(lambda: torch.equal(run(packed), before)) for _ in range(3)]
        stop.set()
        for thread in threads:
            thread.join()
        assert codes == [0, 0, 0]
        assert not failed
    """)


def test_many_threads_use_one_model():
    program("""
        packed = model().prepack()
        before, same = run(packed), []
        def work():
            for _ in range(5):
                same.append(torch.equal(run(packed), before))
        for _ in range(2):  # threads end, and their helpers with them
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert same == [True] * 40
    """)


def test_a_spawned_process(tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(COMMON + textwrap.dedent("""
        def work(packed, before):
            assert torch.equal(run(packed), before)

        if __name__ == "__main__":
            packed = model().prepack()
            context = multiprocessing.get_context("spawn")
            process = context.Process(target=work, args=(packed, run(packed)))
            process.start()
            process.join(40)
            sys.exit(process.exitcode if process.exitcode is not None else 9)
    """))  # fmt: skip
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=LIMIT)
    assert said.returncode == 0, said.stderr


def test_what_another_process_has_fetched_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "cache_directory", lambda: tmp_path)

    def fetch(scratch):
        for folder in (tmp_path / "corpus", scratch / "corpus"):  # the other's first
            folder.mkdir()
            (folder / "text").touch()
        return scratch / "corpus"

    assert (data._cached("corpus", fetch) / "text").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
