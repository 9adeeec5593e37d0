"""What a checkpoint's sentence-transformers files say about embedding with it."""

from __future__ import annotations

import json

import gguf
import pytest

from pipeline.errors import UserError
from pipeline.sentence_transformers import EmbedderFiles, read_embedder

KINDS = "sentence_transformers.models"


def write(folder, *kinds, pooling=None, config=None, limits=None):
    names = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [
        {"idx": place, "name": str(place), "path": names.get(kind, f"{place}_{kind}"), "type": f"{KINDS}.{kind}"}
        for place, kind in enumerate(kinds)
    ]
    if kinds:
        (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if config is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    if limits is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps(limits))


LAST = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False, "include_prompt": True}
WHOLE = ("Transformer", "Pooling", "Normalize")


def test_the_files_of_a_published_decoder_embedder_are_followed(tmp_path):
    query = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
    config = {"prompts": {"query": query, "document": ""}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write(tmp_path, *WHOLE, pooling=LAST, config=config, limits={"max_seq_length": 4096, "do_lower_case": False})
    assert read_embedder(tmp_path) == EmbedderFiles(pooling="last", query_prompt=query, max_tokens=4096)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 8}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_pooling_is_what_the_models_authors_say(tmp_path, config, expected):
    write(tmp_path, pooling=config)
    assert read_embedder(tmp_path).pooling == expected


def test_a_model_without_such_files_says_nothing(tmp_path):
    assert read_embedder(tmp_path) == EmbedderFiles()
    assert read_embedder(tmp_path / "model.gguf") == EmbedderFiles()


@pytest.mark.parametrize(
    ("prompts", "default", "expected"),
    [
        ({"query": "q: ", "passage": "p: "}, None, ("q: ", "p: ")),
        ({"document": "d: ", "passage": "p: "}, None, ("", "d: ")),
        ({"all": "a: "}, "all", ("a: ", "a: ")),
        ({"query": "q: ", "all": "a: "}, "all", ("q: ", "a: ")),
        ({"web_search_query": "Instruct: "}, None, ("", "")),
    ],
)
def test_prompts_are_those_named_for_queries_and_rows_else_the_default_one(tmp_path, prompts, default, expected):
    write(tmp_path, *WHOLE, pooling=LAST, config={"prompts": prompts, "default_prompt_name": default})
    found = read_embedder(tmp_path)
    assert (found.query_prompt, found.passage_prompt) == expected


def test_a_prompt_that_is_not_pooled_is_said_to_be(tmp_path):
    write(tmp_path, *WHOLE, pooling=LAST | {"include_prompt": False})
    assert read_embedder(tmp_path).include_prompt is False


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"kinds": ("Transformer", "Pooling", "Dense")},
            r"step 2 is a Dense module, which is not supported; set",
        ),
        ({"kinds": ("Transformer", "Pooling", "Normalize", "Dense")}, "step 3 is a Dense module"),
        ({"kinds": ("Transformer", "WeightedLayerPooling", "Pooling")}, "step 1 is a WeightedLayerPooling module"),
        ({"kinds": WHOLE, "config": {"similarity_fn_name": "euclidean"}}, "asks for euclidean similarity"),
        ({"kinds": WHOLE[:2], "config": {"similarity_fn_name": "dot"}}, "dot similarity of vectors that are not norm"),
        ({"kinds": WHOLE, "config": {"default_prompt_name": "x"}}, "default_prompt_name 'x' is none of its prompts"),
        (
            {"kinds": WHOLE, "config": {"default_prompt_name": ["x"]}},
            r"default_prompt_name \['x'\] is none of its prompts",
        ),
        ({"kinds": WHOLE, "config": {"prompts": ["x"]}}, "prompts must map names to texts"),
        ({"kinds": WHOLE, "limits": {"do_lower_case": True}}, "do_lower_case is not supported"),
        (
            {"kinds": WHOLE, "pooling": {"pooling_mode_cls_token": True}},
            r"set embed\.pooling to mean, last or",
        ),
        ({"kinds": WHOLE, "pooling": {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}}, "asks for"),
        ({"kinds": WHOLE, "pooling": {}}, "asks for no pooling"),
        ({"kinds": WHOLE, "limits": {"modality_config": {"text": {}, "message": {}}}}, "through the chat template"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(tmp_path, files, message):
    write(
        tmp_path,
        *files["kinds"],
        pooling=files.get("pooling", LAST),
        **{"config": {}, "limits": {}} | {key: files[key] for key in ("config", "limits") if key in files},
    )
    with pytest.raises(UserError, match=message) as caught:
        read_embedder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kinds", "limits", "tokenizer", "expected"),
    [
        (WHOLE, {"max_seq_length": 512}, {"model_max_length": 32768}, 512),
        (WHOLE, {"max_seq_length": None}, {"model_max_length": 32768}, 32768),
        (WHOLE, None, {"model_max_length": 512}, 512),
        (WHOLE, None, {"model_max_length": None}, None),
        ((), None, {"model_max_length": 512}, None),  # of a model that is no embedder
    ],
)
def test_a_text_may_be_as_long_as_the_models_authors_say(tmp_path, kinds, limits, tokenizer, expected):
    write(tmp_path, *kinds, pooling=LAST, limits=limits)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert read_embedder(tmp_path).max_tokens == expected


def gguf_file(path, pooling=None):
    writer = gguf.GGUFWriter(path, "qwen3")
    if pooling is not None:
        writer.add_pooling_type(pooling)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_gguf_file_says_how_it_is_pooled_and_no_more(tmp_path):
    poolings = {None: None, gguf.PoolingType.NONE: None, gguf.PoolingType.MEAN: "mean", gguf.PoolingType.LAST: "last"}
    for asked, expected in poolings.items():
        file = gguf_file(tmp_path / "model.gguf", asked)
        assert read_embedder(file) == EmbedderFiles(pooling=expected)
        assert read_embedder(file, pooling_is_given=True) == EmbedderFiles()
    file = gguf_file(tmp_path / "model.gguf", gguf.PoolingType.CLS)
    with pytest.raises(UserError, match=r"another kind \(qwen3\.pooling_type 2\); set embed\.pooling to mean or last"):
        read_embedder(file)
    assert read_embedder(file, pooling_is_given=True) == EmbedderFiles()


def test_vectors_are_cut_where_the_models_authors_cut_them(tmp_path):
    write(tmp_path, *WHOLE, pooling=LAST, config={"truncate_dim": 256})
    assert read_embedder(tmp_path).dimensions == 256
    assert read_embedder(tmp_path, pooling_is_given=True).dimensions is None


def test_a_model_in_a_folder_of_its_own_is_named_with_its_pooling(tmp_path):
    """Which it could not say of itself: the choice for models without instructions would be taken in silence."""
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "0_Transformer", "type": f"{KINDS}.Transformer"}]))
    with pytest.raises(UserError, match=r"in 0_Transformer/; name that folder as the model, and embed\.pooling"):
        read_embedder(tmp_path)


def test_code_of_the_models_own_is_refused(tmp_path):
    write(tmp_path, *WHOLE, pooling=LAST)
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoTokenizer": "tokenization_qwen.Qwen2Tokenizer"}}')
    assert read_embedder(tmp_path).pooling == "last"
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_gritlm7b.MistralModel"}}')
    with pytest.raises(UserError, match=r"code of its own \(auto_map\), which is never run; set embed\.pooling"):
        read_embedder(tmp_path)
    assert read_embedder(tmp_path, pooling_is_given=True) == EmbedderFiles()


def test_texts_of_a_model_with_a_chat_template_may_be_put_to_it_as_they_are(tmp_path):
    write(tmp_path, *WHOLE, pooling=LAST, limits={"modality_config": {"text": {"method": "forward"}}})
    assert read_embedder(tmp_path).pooling == "last"


def test_a_dot_product_of_normalised_vectors_is_a_cosine(tmp_path):
    write(tmp_path, *WHOLE, pooling=LAST, config={"similarity_fn_name": "dot"})
    assert read_embedder(tmp_path).pooling == "last"


def test_a_pooling_of_the_jobs_own_leaves_out_what_comes_after_the_transformer(tmp_path):
    config, limits = {"similarity_fn_name": "dot", "prompts": {"query": "q: "}}, {"modality_config": {"message": {}}}
    kinds = ("Transformer", "Pooling", "Dense")
    write(tmp_path, *kinds, pooling={"pooling_mode_cls_token": True}, config=config, limits=limits)
    assert read_embedder(tmp_path, pooling_is_given=True) == EmbedderFiles(query_prompt="q: ")


def test_damaged_files_are_refused_in_one_line(tmp_path):
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (tmp_path / name).write_text("{")
        with pytest.raises(UserError, match=name):
            read_embedder(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "modules.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="a list of modules"):
        read_embedder(tmp_path)
