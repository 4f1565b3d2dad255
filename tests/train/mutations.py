"""Breaks of what training on several processes rests on: (file, fragment, broken fragment, the test that fails)."""

TRAIN, DATA = "llava_fast/train/", "llava_fast/data/"
WORLD, RANKS = "tests/train/test_world.py", "tests/train/test_distributed.py"
ALIKE = f"{WORLD}::test_every_batch_takes_part_in_the_same_collectives"
NORM = f"{WORLD}::test_the_norm_is_that_of_all_shards"
SHARD = f"{WORLD}::test_of_a_whole_checkpoint_a_rank_takes_its_shard"
DAMAGE = f"{WORLD}::test_damage_that_one_rank_finds_makes_all_pass_over"
TWO = f"{RANKS}::test_two_processes_learn_what_one_does"
FOUR = f"{RANKS}::test_four_processes_and_hybrid_shards_learn_what_one_does"
EVEN = f"{RANKS}::test_shares_are_even_and_every_sample_is_read_once"

MUTATIONS = [
    # the global batch
    (
        f"{TRAIN}trainer.py",
        "self.world.sum(count).clamp(min=1)",
        "count.clamp(min=1)",
        f"{WORLD}::test_the_loss_is_divided_by_the_count_of_all_ranks",
    ),
    (
        f"{TRAIN}trainer.py",
        "told = self.world.sum(torch.cat(",
        "told = (torch.cat(",
        f"{WORLD}::test_what_is_told_of_a_step_is_of_all_ranks",
    ),
    (f"{TRAIN}distributed.py", "set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(2.0)", TWO),
    (f"{TRAIN}distributed.py", "module.set_gradient_divide_factor(1.0)", "pass", TWO),
    (f"{TRAIN}trainer.py", "world.sum(told.to(model.device))", "told.to(model.device)", TWO),
    (f"{TRAIN}distributed.py", "dist.all_reduce(total, group=param", "(total, param", NORM),
    (f"{TRAIN}distributed.py", "for p in param.placements].index(True)", "for p in param.placements] and 0", NORM),
    (
        f"{TRAIN}trainer.py",
        "+ 1_000_003 * self.step + self.world.rank",
        "+ 1_000_003 * self.step",
        f"{WORLD}::test_dropout_differs_between_steps_and_ranks_and_not_between_starts",
    ),
    # every rank in every collective, as often
    (
        f"{TRAIN}trainer.py",
        "* (len(bins) - len(batches))\n            yield",
        "* 0\n            yield",
        f"{WORLD}::test_a_rank_without_a_batch_takes_as_many_passes",
    ),
    (f"{TRAIN}distributed.py", "reduce_dtype=torch.float32", "reduce_dtype=None", ALIKE),
    (f"{TRAIN}distributed.py", "param.data = param.data.float()", "pass", ALIKE),
    (f"{TRAIN}distributed.py", '{"ignored_params": set(model.vision_tower.parameters())}', "{}", ALIKE),
    (
        "llava_fast/model/llava.py",
        "return self.projector(features, ",
        "return (self.projector if len(features) else self.projector.forward)(features, ",
        ALIKE,
    ),
    (
        f"{TRAIN}distributed.py",
        "            raise result[1]\n",
        "            pass\n",
        f"{WORLD}::test_an_error_on_rank_0_is_raised_and_not_swallowed",
    ),
    (f"{TRAIN}distributed.py", "dist.ReduceOp.MAX", "dist.ReduceOp.MIN", FOUR),
    # shares of the data
    (f"{DATA}dealing.py", "(epoch, bins[rank])", "(epoch, bins[0])", EVEN),
    (f"{DATA}dealing.py", "count * ranks, max_tokens)) is None", "count * ranks, 2 * max_tokens)) is None", EVEN),
    (
        f"{DATA}loader.py",
        "seed=seed + 7919 * epoch",
        "seed=seed",
        "tests/data/test_loader.py::test_plans_are_seeded_and_epochs_differ",
    ),
    (
        f"{TRAIN}trainer.py",
        "sizes[i::ranks] = part",
        "sizes[i * len(part) : (i + 1) * len(part)] = part",
        f"{WORLD}::test_sizes_measured_by_two_are_those_measured_by_one",
    ),
    (
        f"{DATA}dealing.py",
        'np.argsort(done, kind="stable")',
        "np.arange(ranks)",
        f"{RANKS}::test_work_is_shared_by_cost_and_not_by_tokens",
    ),
    (
        f"{TRAIN}trainer.py",
        "spare = len(bins) - len(batches) if",
        "spare = 0 if",
        f"{WORLD}::test_held_out_samples_fewer_than_ranks",
    ),
    # checkpoints
    (
        f"{TRAIN}sharded_checkpoints.py",
        "        writing.result()\n",
        "",
        f"{WORLD}::test_shards_get_their_name_when_all_are_written",
    ),
    (f"{TRAIN}sharded_checkpoints.py", "for found in files for k", "for found in files[:1] for k", TWO),
    (
        f"{TRAIN}sharded_checkpoints.py",
        "in world.gather(_fault_in(path, world))",
        "in [_fault_in(path, world)]",
        DAMAGE,
    ),
    (f"{TRAIN}sharded_checkpoints.py", "for name in (METADATA, STATE):", "for name in (STATE,):", DAMAGE),
    (f"{TRAIN}sharded_checkpoints.py", "[: -self.keep]", "[:0]", DAMAGE),
    (f"{TRAIN}sharded_checkpoints.py", "            shutil.rmtree(final)\n", "            pass\n", DAMAGE),
    (f"{TRAIN}checkpoints.py", "[share[0] :: share[1]]", "[share[0] :: share[1] + 1]", DAMAGE),
    (f"{TRAIN}distributed.py", "    if not is_shared(value):\n", "    if False:\n", SHARD),
    (f"{TRAIN}optimizer.py", "like(self.params[name], value) if", "value if", SHARD),
    (f"{TRAIN}optimizer.py", "like(self.params[name], master.detach())", "master.detach()", SHARD),
    (
        f"{TRAIN}distributed.py",
        "os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')",
        "0",
        f"{RANKS}::test_a_killed_rank_is_started_again_and_the_run_goes_on",
    ),
]
