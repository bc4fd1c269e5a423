"""Files by what reads them."""

import pytest

from quantcli.verification.kinds import use_of


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["modeling_x.py", "sub/x.PY", "x.pyc", "ops.so", "__pycache__/", ".hidden.py"], "code"),
        (["pytorch_model.bin", "training_args.bin", "a/b.pt", "x.pkl"], "pickle"),
        (["model.safetensors", "onnx/model.onnx", "x.gguf", "x.safetensors.index.json"], "weights"),
        (["chat_template.jinja", "chat_template.json", "t/tools.jinja"], "template"),
        (["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "merges.txt",
          "dict.txt", "added_tokens.json", "special_tokens_map.json", "tekken.json",
          "qwen.tiktoken"], "tokenizer"),
        (["generation_config.json", "preprocessor_config.json", "1_Pooling/config.json"], "settings"),
        (["weights.xyz", "LICENSE.exe.zip"], "a library may look for it"),
        (["elsewhere/"], "link to a folder"),
    ],
)  # fmt: skip
def test_files_that_something_may_read(names, word):
    for name in names:
        assert word in (use_of(name) or ""), name


@pytest.mark.parametrize(
    "name",
    [".gitattributes", ".cache/", ".git/", "README.md", "LICENSE", "LICENSE.txt", "NOTICE", "model.sig",
     "model.sigstore.json", "SHA256SUMS", "assets/figure.png", "notes.txt", "recipe.yaml"],
)  # fmt: skip
def test_files_that_people_read(name):
    assert use_of(name) is None
