"""Pushing to and loading from the Hub, over real HTTP against the local one (tests/hub_server.py).

Each step runs in a subprocess, because huggingface_hub reads HF_ENDPOINT at import; imports take seconds, so related
steps share one. Loading happens in another process than pushing, with an empty cache of its own.
"""

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer

TEXT = "naïve rank"  # 10 characters, 11 bytes of UTF-8

PUSH = """
    import json, sys
    from pathlib import Path

    import numpy as np
    import torch
    from huggingface_hub import HfApi
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    out, text = Path(sys.argv[1]), sys.argv[2]
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte_level = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level)
    ids = tokenizer(text, return_tensors="pt").input_ids

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()

    def keep_logits(name, model):
        with torch.no_grad():
            np.save(out / name, model(ids).logits.numpy())

    keep_logits("first", model)
    model.push_to_hub("tester/tiny-gpt2", commit_message="first weights")
    tokenizer.push_to_hub("tester/tiny-gpt2")
    first = HfApi().model_info("tester/tiny-gpt2").sha
    model.lm_head.weight.data *= 2
    keep_logits("second", model)
    second = model.push_to_hub("tester/tiny-gpt2", commit_message="second weights").oid

    base = AutoModelForCausalLM.from_pretrained("tester/tiny-gpt2")
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)  # B isn't 0
    adapted = get_peft_model(base, lora).eval()
    keep_logits("adapted", adapted)
    adapted.push_to_hub("tester/tiny-lora")

    from hf_efx import LowRankConfig, get_efx_model

    dense = AutoModelForCausalLM.from_pretrained("tester/tiny-gpt2")
    low_rank_adapter = get_peft_model(dense, LowRankConfig(rank=0.5)).eval()
    keep_logits("low_rank_adapter", low_rank_adapter)
    low_rank_adapter.push_to_hub("tester/tiny-low-rank-adapter")
    low_rank = get_efx_model(low_rank_adapter.unload(), LowRankConfig(rank=0.25))
    keep_logits("low_rank", low_rank)
    low_rank.push_to_hub("tester/tiny-low-rank")
    print(json.dumps({"first": first, "second": second}))
"""

PULL = """
    import json, sys
    from pathlib import Path

    import numpy as np
    import torch
    from huggingface_hub import HfApi
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, text, first = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    tokenizer = AutoTokenizer.from_pretrained("tester/tiny-gpt2")
    ids = tokenizer(text, return_tensors="pt").input_ids

    def keep_logits(name, model):
        with torch.no_grad():
            np.save(out / name, model.eval()(ids).logits.numpy())

    keep_logits("first", AutoModelForCausalLM.from_pretrained("tester/tiny-gpt2", revision=first))
    model = AutoModelForCausalLM.from_pretrained("tester/tiny-gpt2")
    keep_logits("second", model)
    keep_logits("adapted", PeftModel.from_pretrained(model, "tester/tiny-lora"))

    import hf_efx

    hf_efx.register_peft()
    dense = AutoModelForCausalLM.from_pretrained("tester/tiny-gpt2")
    keep_logits("low_rank_adapter", PeftModel.from_pretrained(dense, "tester/tiny-low-rank-adapter"))
    keep_logits("low_rank", AutoModelForCausalLM.from_pretrained("tester/tiny-low-rank"))

    info = HfApi().model_info("tester/tiny-gpt2", files_metadata=True)
    print(json.dumps({
        "ids": ids[0].tolist(),
        "decoded": tokenizer.decode(ids[0]),
        "sha": info.sha,
        "lfs": {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs},
        "plain": [file.rfilename for file in info.siblings if not file.lfs],
        "titles": [commit.title for commit in HfApi().list_repo_commits("tester/tiny-gpt2")],
        "adapter": sorted(HfApi().list_repo_files("tester/tiny-lora")),
    }))
"""


@pytest.fixture(scope="module")
def round_trip(hub, run_python, tmp_path_factory):
    """What the two processes saw: "pushed" and "pulled", their reports; "logits", by name those before and after."""
    out, home = [tmp_path_factory.mktemp(name) for name in ("pushed", "pulled")], tmp_path_factory.mktemp("home")
    pushed = json.loads(run_python(PUSH, env=hub.env, args=[out[0], TEXT]))
    env = hub.env | {"HF_HOME": str(home)}
    pulled = json.loads(run_python(PULL, env=env, args=[out[1], TEXT, pushed["first"]]))
    names = ("first", "second", "adapted", "low_rank_adapter", "low_rank")
    logits = {name: [np.load(folder / f"{name}.npy") for folder in out] for name in names}
    return {"pushed": pushed, "pulled": pulled, "logits": logits}


def test_model_and_tokenizer_come_back_the_same(round_trip, hub):
    pulled = round_trip["pulled"]
    before, after = round_trip["logits"]["second"]
    np.testing.assert_array_equal(after, before)
    assert before.shape == (1, 11, 256)  # one token a byte, so the two of "ï" count
    assert len(pulled["ids"]) == 11
    assert pulled["decoded"] == TEXT
    assert pulled["sha"] == round_trip["pushed"]["second"]

    assert list(pulled["lfs"]) == ["model.safetensors"]
    assert {"config.json", "tokenizer.json", "README.md"} <= set(pulled["plain"])
    digest = pulled["lfs"]["model.safetensors"]
    assert hashlib.sha256((hub.root / "objects" / digest).read_bytes()).hexdigest() == digest


def test_an_old_revision_still_loads(round_trip):
    first, second = round_trip["logits"]["first"], round_trip["logits"]["second"]
    np.testing.assert_array_equal(first[1], first[0])
    assert not np.array_equal(first[1], second[1])
    assert round_trip["pushed"]["first"] != round_trip["pushed"]["second"]
    assert round_trip["pulled"]["titles"] == ["second weights", "Upload tokenizer", "first weights", "initial commit"]


@pytest.mark.parametrize("name", ["low_rank_adapter", "low_rank"])
def test_low_rank_models_load_by_repository_id(round_trip, name):
    before, after = round_trip["logits"][name]
    np.testing.assert_array_equal(after, before)
    assert not np.array_equal(after, round_trip["logits"]["second"][1])  # it isn't the dense model


def test_lora_adapter_loads_by_repository_id(round_trip):
    before, after = round_trip["logits"]["adapted"]
    np.testing.assert_array_equal(after, before)
    assert not np.array_equal(after, round_trip["logits"]["second"][1])  # the adapter does something
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(round_trip["pulled"]["adapter"])
    assert "model.safetensors" not in round_trip["pulled"]["adapter"]


def test_dataset_round_trip(hub, run_python):
    rows = [
        {"text": "the first row", "label": 0, "weight": 0.1, "ids": [1, 2, 3]},
        {"text": None, "label": 2, "weight": 1e-300, "ids": []},
        {"text": "naïve – „zwei“ 三", "label": -(2**40), "weight": -0.5, "ids": [7]},
    ]
    code = """
        import json, sys
        from datasets import Dataset, load_dataset

        rows = json.loads(sys.argv[1])
        Dataset.from_list(rows[:2]).push_to_hub("tester/rows", split="train")
        Dataset.from_list(rows[2:]).push_to_hub("tester/rows", split="test")
        loaded = load_dataset("tester/rows")
        streamed = load_dataset("tester/rows", split="train", streaming=True)
        print(json.dumps({"loaded": {k: v.to_list() for k, v in loaded.items()}, "streamed": list(streamed)}))
    """
    got = json.loads(run_python(code, env=hub.env, args=[json.dumps(rows)]))
    assert got == {"loaded": {"train": rows[:2], "test": rows[2:]}, "streamed": rows[:2]}


def test_model_card_keeps_its_metadata(hub, run_python):
    code = """
        import json
        from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, create_repo

        result = EvalResult(
            task_type="text-generation", dataset_type="stdlib", dataset_name="docs", metric_type="perplexity",
            metric_value=12.5,
        )
        data = ModelCardData(model_name="tiny", license="apache-2.0", tags=["low-rank"], eval_results=[result])
        create_repo("tester/card", exist_ok=True)
        create_repo("tester/card", exist_ok=True)
        ModelCard(f"---\\n{data.to_yaml()}\\n---\\n\\n# Tiny – naïve\\n").push_to_hub("tester/card")
        card, info = ModelCard.load("tester/card"), HfApi().model_info("tester/card")
        try:
            HfApi().upload_file(
                path_or_fileobj=b"---\\nlicense: [unclosed\\n---\\n", path_in_repo="README.md", repo_id="tester/card"
            )
        except ValueError as error:
            refused = str(error)
        (read,) = card.data.eval_results
        metadata = [card.data.license, card.data.tags, read.metric_value, card.text.strip()]
        print(json.dumps([*metadata, info.tags, refused]))
    """
    *card, refused = json.loads(run_python(code, env=hub.env))
    assert card == ["apache-2.0", ["low-rank"], 12.5, "# Tiny – naïve", ["low-rank"]]
    assert refused.startswith("Invalid metadata in README.md")


def test_folder_comes_back_byte_for_byte(hub, run_python, tmp_path):
    source, home = tmp_path / "source", tmp_path / "home"
    contents = {
        "notes.md": "plain text – ümlaut\n".encode(),
        "empty.txt": b"",
        "deep/er/table.csv": b"a,b\r\n1,2\r\n",
        "deep/state": bytes(range(256)) * 8192,  # 2 MiB, binary by its content and not by its name
        "twin.bin": b"same content",
        "deep/twin.bin": b"same content",
    }
    for name, content in contents.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    code = """
        import json, sys
        from huggingface_hub import HfApi, snapshot_download

        api, repo = HfApi(), "tester/folder"
        api.create_repo(repo)
        sent = api.upload_folder(repo_id=repo, folder_path=sys.argv[1])
        again = api.upload_folder(repo_id=repo, folder_path=sys.argv[1])
        api.create_tag(repo, tag="v1")
        folder = snapshot_download(repo)
        api.delete_folder("deep", repo)
        listed = [entry.path for entry in api.list_repo_tree(repo)]
        tagged = [entry.path for entry in api.list_repo_tree(repo, path_in_repo="deep", revision="v1")]
        print(json.dumps([folder, sent.oid == again.oid, sorted(listed), sorted(tagged)]))
    """
    folder, unchanged, listed, tagged = json.loads(
        run_python(code, env=hub.env | {"HF_HOME": str(home)}, args=[source])
    )
    got = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    assert got.pop(".gitattributes").startswith(b"*.safetensors filter=lfs")
    assert got == contents
    assert unchanged  # an equal folder makes no commit
    assert listed == [".gitattributes", "empty.txt", "notes.md", "twin.bin"]
    assert tagged == ["deep/er", "deep/state", "deep/twin.bin"]


def test_errors_are_those_of_huggingface_hub(hub, run_python):
    code = """
        import json
        from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download

        api = HfApi()
        api.create_repo("tester/errors")
        api.create_branch("tester/errors", branch="side")
        head = api.model_info("tester/errors").sha


        def commit(name, **options):
            return api.create_commit("tester/errors", [CommitOperationAdd(name, b"a")], commit_message="a", **options)

        commit("a.txt", revision="side", parent_commit=head)
        attempts = {
            "missing repository": lambda: hf_hub_download("tester/nothing", "config.json"),
            "id of one word": lambda: hf_hub_download("nothing", "config.json"),
            "missing data set": lambda: api.dataset_info("tester/errors"),
            "missing file": lambda: hf_hub_download("tester/errors", "config.json"),
            "missing revision": lambda: snapshot_download("tester/errors", revision="nowhere"),
            "repository exists": lambda: api.create_repo("tester/errors"),
            "no token": lambda: commit("b.txt", token=False),
            "no such route": lambda: next(api.get_repo_discussions("tester/errors")),
            "parent has moved on": lambda: commit("b.txt", revision="side", parent_commit=head),
        }
        got = {}
        for name, attempt in attempts.items():
            try:
                got[name] = repr(attempt())
            except Exception as error:
                names = [base.__name__ for base in type(error).__mro__]
                got[name] = [names[0], "EntryNotFoundError" in names, error.response.status_code]
        path = hf_hub_download("tester/errors", "a.txt", revision="side")
        print(json.dumps([got, api.file_exists("tester/errors", "a.txt"), path]))
    """
    got, on_main, path = json.loads(run_python(code, env=hub.env))
    assert got == {
        "missing repository": ["RepositoryNotFoundError", False, 404],
        "id of one word": ["RepositoryNotFoundError", False, 404],
        "missing data set": ["RepositoryNotFoundError", False, 404],
        "missing file": ["RemoteEntryNotFoundError", True, 404],
        "missing revision": ["RevisionNotFoundError", False, 404],
        "repository exists": ["HfHubHTTPError", False, 409],
        "no token": ["HfHubHTTPError", False, 401],
        "no such route": ["HfHubHTTPError", False, 501],
        "parent has moved on": ["HfHubHTTPError", False, 412],
    }
    assert not on_main
    assert Path(path).read_bytes() == b"a"


def test_server_by_hand_keeps_what_was_pushed(tmp_path, run_python, hub):
    """`python tests/hub_server.py` prints its endpoint; a second run over the folder serves what the first got."""
    script = Path(__file__).parents[1] / "hub_server.py"
    command = [sys.executable, script, "--root", tmp_path / "kept"]
    push = "print(HfApi().whoami()['name'], HfApi().create_repo('kept').repo_id)"
    answers = []
    for code in (push, "print(HfApi().list_repo_files('tester/kept'))"):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                env = hub.env | {"HF_ENDPOINT": server.stdout.readline().strip()}
                answers.append(run_python("from huggingface_hub import HfApi; " + code, env=env).strip())
            finally:
                server.terminate()
    assert answers == ["tester tester/kept", "['.gitattributes']"]


def test_storage_serves_ranges_and_checks_what_it_is_sent(tmp_path):
    """What clients rely on without showing it: Parquet is read in ranges, a damaged upload is never stored."""
    content = b"0123456789"
    digest = hashlib.sha256(content).hexdigest()
    open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def ask(method, body=None, **headers):
        headers = {name.title(): value for name, value in headers.items()}
        request = urllib.request.Request(f"{server.storage_endpoint}/{digest}", body, headers, method=method)
        try:
            with open_url(request) as answer:
                return answer.status, answer.read(), answer.headers.get("Content-Range")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)["error"].split()[0], error.headers.get("Content-Range")

    with HubServer(tmp_path) as server:
        assert ask("PUT", b"0123456780") == (400, "The", None)
        assert ask("GET") == (404, "No", None)
        assert ask("PUT", content)[0] == 200
        assert ask("GET") == (200, content, None)
        assert ask("GET", range="bytes=2-4") == (206, b"234", "bytes 2-4/10")
        assert ask("GET", range="bytes=7-") == (206, b"789", "bytes 7-9/10")
        assert ask("GET", range="bytes=-2") == (206, b"89", "bytes 8-9/10")
        assert ask("GET", range="bytes=8-99") == (206, b"89", "bytes 8-9/10")
        assert ask("GET", range="bytes=10-") == (416, "Range", "bytes */10")
        assert ask("GET", authorization="Bearer secret") == (403, "A", None)
