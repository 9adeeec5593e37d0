"""`gristmill generate`: one prompt through a model in this process, rendered and sampled as a job would."""

from __future__ import annotations

import pyarrow as pa

from jobs.spec import GenerateSpec
from pipeline.errors import RowError, UserError
from pipeline.model_path import resolve_model
from pipeline.prompts import ModelText, PromptBuilder, PromptSettings
from pipeline.schemas import InputSchema
from pipeline.source import Rows
from workers.devices import num_cpus
from workers.engine_factory import load_engine
from workers.sampling_choice import resolve_sampling
from workers.settings import EngineSettings


def answer_prompt(model: str, prompt: str, *, max_new_tokens: int, dtype: str) -> str:
    """The model's answer, through its chat template where it has one. UserError where it can't answer.

    `dtype` is as a job's `cluster.dtype`.
    """
    path = resolve_model(model)
    sampling = resolve_sampling(GenerateSpec(max_new_tokens=max_new_tokens).model_dump(), path)
    loaded = load_engine(
        EngineSettings(model_path=str(path), device="auto", dtype=dtype, threads=num_cpus(), max_sequences=1)
    )
    loaded.refuse_generation(model)
    tokenizer = loaded.tokenizer
    batch = pa.record_batch({"text": [prompt]})
    builder = PromptBuilder(
        PromptSettings(column="text"),
        InputSchema(batch.schema),
        model=ModelText.of(tokenizer),
    )
    (built,) = builder.build(Rows(first_row=0, batch=batch, errors={}))
    tokens = built if isinstance(built, RowError) else tokenizer.encode_batch([built])[0]
    if isinstance(tokens, RowError):
        raise UserError(f"--prompt: {tokens.message}")
    (output,) = loaded.engine.generate([tokens], sampling)
    if output.error is not None:
        raise UserError(f"--prompt: {output.error.message}")
    return str(output.text)
