"""`generate` of transformers on the same rows: sampling alone, no log-probabilities kept."""

from shared import Stopwatch, begin, tokenizer_of

job = begin()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

watch = Stopwatch()
tokenizer = tokenizer_of(job, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(job["model"]).eval()
model.generation_config.eos_token_id = None  # no token ends a response
inputs = tokenizer([p for p in job["prompts"] for _ in range(job["group"])], return_tensors="pt")
inputs.pop("token_type_ids", None)
torch.manual_seed(0)
watch.mark()
for _ in range(job["warmup"] + job["steps"]):
    out = model.generate(
        **inputs,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=job["new_tokens"],
        eos_token_id=None,
        pad_token_id=0,
    )
    assert out.shape[1] == inputs["input_ids"].shape[1] + job["new_tokens"], "a response ended early"
    assert model.generation_config.eos_token_id is None, "a token can end a response"
    watch.mark()
watch.report(job, ["transformers", "torch"])
