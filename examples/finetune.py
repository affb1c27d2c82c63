"""Fine-tune a model on longer texts: one GPU, many GPUs or a CPU; LoRA, LongLoRA or everything.

    python examples/finetune.py examples/configs/tiny.yaml              # a minute, on a CPU
    python examples/finetune.py examples/configs/lora.yaml --model PATH --data PATH
    accelerate launch --config_file examples/configs/accelerate_fsdp2.yaml \\
        examples/finetune.py examples/configs/full.yaml --model PATH --data PATH
    accelerate launch --config_file examples/configs/accelerate_shared.yaml \\
        examples/finetune.py examples/configs/lora.yaml --model PATH --max_length 524288
    torchrun --nproc_per_node 2 examples/finetune.py examples/configs/tiny.yaml --use_cpu

The options are those below, of finetuning/options.py, and transformers' TrainingArguments; a file
of them comes first, others override it. The same command goes on with a run that was stopped, from
its last complete checkpoint: a kill costs the steps after that, at most --save_steps.

Leaves in --output_dir: the model or the adapter, with the tokenizer; merged/ with --merge;
metrics.csv; losses.png.
"""

import sys
from pathlib import Path

from finetuning import data, model, options, records
from torch.utils.data import Subset
from transformers import AutoTokenizer, Trainer, set_seed

from hf_flash_patch.parallel import share_in_trainer


def main(arguments: list[str]) -> Trainer:
    """Runs it all, or what is left of it; returns the trainer when done."""
    of_model, of_data, training = options.read(arguments)
    set_seed(training.seed)
    output = Path(training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with training.main_process_first(desc="removing incomplete checkpoints"):
        checkpoint = records.last_complete(output)
        if training.should_save:
            records.remove_incomplete(output)

    train, test = data.held_out(data.texts(of_data.data, of_data))
    if of_data.eval_data is not None:
        train = {**train, **test}
        test = data.texts(of_data.eval_data, of_data)
    name = of_model.tokenizer or of_model.model
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
    else:
        tokenizer = data.new_tokenizer(train, of_data.vocab_size)
    network, patch = model.load(of_model, tokenizer)
    config = network.config
    longest = config.get_text_config().max_position_embeddings
    length = of_data.length or of_model.max_length or longest
    lengths = sorted(of_data.eval_lengths or [length])

    masked = model.is_masked(config)
    test_tokens = data.tokens(tokenizer, test)
    mask_token = tokenizer.mask_token_id if masked else None
    windows = {
        str(n): data.Windows(test_tokens, n, lengths, of_data.eval_windows, mask_token)
        for n in lengths
    }
    network = model.with_lora(network, of_model)
    techniques = model.with_memory(network, of_model)
    if training.process_index == 0:
        print(*([] if patch is None else [patch]), *techniques, sep="\n")
    rows = data.Rows(data.tokens(tokenizer, train), length, of_data.packing)
    if checkpoint is not None and records.step_of(checkpoint) >= training.max_steps > 0:
        # Trainer would go one step further; with one step an epoch, no epoch is left to begin.
        rows = Subset(rows, range(training.per_device_train_batch_size))
    training.eval_on_start = checkpoint is None
    trainer = Trainer(
        model=network,
        args=training,
        train_dataset=rows,
        eval_dataset=windows,
        data_collator=data.Collator(
            tokenizer, of_data.packing, masked, model.first_position(config)
        ),
        processing_class=tokenizer,
        callbacks=[records.CompleteCheckpoints(), records.MetricsFile(output / "metrics.csv")],
    )
    sharing = getattr(trainer.accelerator, "parallelism_config", None)
    if sharing is not None and sharing.cp_enabled:
        shared = share_in_trainer(trainer, method=of_model.share)
        trainer.data_collator.multiple = shared.multiple
        if training.process_index == 0:
            print(shared)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    log = trainer.state.log_history
    if trainer.state.global_step not in records.losses(log, f"eval_{lengths[-1]}_loss"):
        trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        records.draw(log, lengths, output / "losses.png")
        if of_model.merge and of_model.tune != "full":
            model.save_merged(of_model, output, output / "merged")
        for n in lengths:
            first, *_, last = 2 * list(records.losses(log, f"eval_{n}_loss").values())
            print(f"{n:>9,} tokens: loss {first:.4f} before, {last:.4f} after")
        print(f"Figure: {output / 'losses.png'}")
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
