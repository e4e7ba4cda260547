"""A checkpoint as OpenVINO reads it, weights in float32: python openvino_export.py CHECKPOINT TARGET"""

import sys

from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer


def main() -> None:
    source, target = sys.argv[1:]
    model = OVModelForCausalLM.from_pretrained(source, export=True, load_in_8bit=False, compile=False)
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(target)
    try:
        import openvino
        from openvino_tokenizers import convert_tokenizer

        for name, part in zip(
            ("tokenizer", "detokenizer"), convert_tokenizer(tokenizer, with_detokenizer=True), strict=True
        ):
            openvino.save_model(part, f"{target}/openvino_{name}.xml")
    except Exception as error:  # the loop sends ids and reads ids
        print(f"no tokenizer in the export: {error}")


if __name__ == "__main__":
    main()
