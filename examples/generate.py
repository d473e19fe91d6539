"""SmolLM2-135M generates text through braze: the same tokens as eager, in float32."""

from smollm2 import arguments, compare, first_layers, load, prompt, show


def main() -> None:
    args = arguments(__doc__)
    model, tokenizer = load()
    if args.quick:
        model = first_layers(model, 4)
    ids = prompt(tokenizer)
    runs = compare(model, ids, args.tokens)
    show("SmolLM2-135M", model, tokenizer, ids, runs)
    if runs["braze"].ids != runs["eager"].ids:
        raise SystemExit("braze's text differs from eager's")


if __name__ == "__main__":
    main()
