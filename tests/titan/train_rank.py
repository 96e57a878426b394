"""One rank of the invariance tests' runs: torchtitan's Trainer, fed with given batches.

A job is a dict of `argv` (torchtitan's options), `tokens` (steps, sequences, length + 1), `steps`
after which it ends, and `out`, the folder for what this rank saw: losses and gradients' norms by
step, per weight the operands that the first step quantized, and the number of weights that FSDP
gathers in codes.
"""

import os
from dataclasses import replace

import torch
from ranks import free_port
from support import do_not_sleep, recording

from nvfp4_titan.titan import cpu_runtime

IGNORED = -100  # torchtitan's


class Batches:
    """This data rank's part of every global batch, and the state of a dataloader that has none."""

    def __init__(self, tokens, ranks, rank, local):
        self.tokens, self.ranks, self.rank, self.local = tokens, ranks, rank, local

    def __iter__(self):
        for batch in self.tokens:
            for first in range(self.rank * self.local, len(batch), self.ranks * self.local):
                part = batch[first : first + self.local]
                labels = part[:, 1:].clone()
                labels[labels % 7 == 0] = IGNORED  # of some microbatches more than of others
                yield {"input": part[:, :-1].clone()}, labels

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def attach_recorders(model_parts):
    """A recorder at every converted weight; the recordings by FQN."""
    from nvfp4_titan.training import NVFP4Linear
    from nvfp4_titan.training.experts import WrappingExperts

    made = {}
    for part in model_parts:
        for name, module in part.named_modules():
            fqn = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
            if isinstance(module, NVFP4Linear):
                module.backend, made[f"{fqn}.weight"] = recording()
            elif isinstance(module, WrappingExperts):
                for weight, (key, options) in module._converted.items():
                    backend, made[f"{fqn}.{weight}"] = recording()
                    module._converted[weight] = (key, replace(options, backend=backend))
    return made


def gathered_in_codes(model_parts):
    from nvfp4_titan.distributed import fsdp_records
    from nvfp4_titan.distributed.fp4_gather import QuantizingShard

    return sum(
        isinstance(record.sharded_param._local_tensor, QuantizingShard)
        for part in model_parts
        for record in fsdp_records(part).values()
    )


def run(job, rank, store):
    from nvfp4_titan.titan.trainer import NVFP4Trainer, parse

    if rank == 0:  # now, and not when the jobs were made: connections of others take ports, too
        store.set(job["out"], str(free_port()))
    os.environ["MASTER_PORT"] = store.get(job["out"]).decode()
    config = parse(job["argv"])
    trainer = NVFP4Trainer(config)
    mesh = trainer.parallel_dims.get_optional_mesh("batch")
    ranks, data_rank = (mesh.size(), mesh.get_local_rank()) if mesh else (1, 0)
    trainer.dataloader = Batches(job["tokens"], ranks, data_rank, config.training.local_batch_size)
    config.training.steps = job["steps"]  # the schedules stay those of the options
    made, losses, norms, first = attach_recorders(trainer.model_parts), {}, {}, {}

    def log(step, loss, largest, norm, **kwargs):
        losses[step], norms[step] = float(loss), float(norm)
        if step == 1:
            first.update({fqn: list(calls) for fqn, calls in made.items()})
        for calls in made.values():
            calls.clear()

    trainer.metrics_processor.log = log
    trainer.train()
    gathered = gathered_in_codes(trainer.model_parts)
    trainer.close()
    torch.distributed.destroy_process_group()
    seen = {"losses": losses, "norms": norms, "operands": first, "gathered": gathered}
    torch.save(seen, os.path.join(job["out"], f"{rank}.pt"))


def run_all(rank, path, world):
    """Run the jobs that were saved to a file."""
    do_not_sleep()
    cpu_runtime.patch_moe()
    store = torch.distributed.FileStore(f"{path}.store", world)
    for job in torch.load(path):
        run(job, rank, store)
