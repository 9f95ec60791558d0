r"""EGRSD and CL-EGRSD (arXiv 2605.13255) in one file, from prompts to optimizer.step(). Read this first.

    python minimal.py                                   the toy, one to two minutes on a laptop CPU
    python minimal.py --model Qwen/Qwen3-0.6B --data train.jsonl --steps 100 --prompts 32 --micro-batch 2 \
        --max-new-tokens 1024 --temperature 1.1 --top-p 0.95 --top-k 20 --rank 64 --alpha 128 --lr 5e-6

The data is JSON lines with problem, solution and answer. `--window 0` is EGRSD. `--gamma 0` has no gate.

One step: the student samples a completion of every problem. A verifier says right or wrong. The
teacher has the same weights without the adapter, and its prompt shows the reference solution. Student
and teacher read the completions. The weight of a token in the loss is a product of three signals:

    advantage    how much better the completion is than earlier ones; its sign is the direction
    magnitude    teacher's likelihood / student's, inverted where the advantage is negative, and clipped
    gate         less trust in the teacher where its entropy is high

train.py trains the same way: tests/test_minimal.py compares prompts, rewards and every gradient.
train.py adds many GPUs and bfloat16, faster sampling, logits in chunks, a verifier that knows 1/2 =
0.5, epochs without gaps, checkpoints and evaluation. It freezes routers and experts, and refuses what
cannot work. This file checks nothing: no flag and no length, and --out is overwritten. It holds all
logits of a micro-batch in float32: tokens x vocabulary numbers, several times. A model of 4 billion
parameters needs train.py.
"""

import argparse
import json
import random
import re
from statistics import fmean, pstdev

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

FLAGS = (
    ("model", "toy", "a chat model: directory or hub id; toy: the one in this repository"),
    ("data", "", "JSON lines with problem, solution and answer; the toy has its own"),
    ("out", "runs/minimal", "directory for the trained model"),
    ("seed", 0, "seed of the adapter, the problems and the sampling"),
    ("steps", 64, "optimizer steps"),
    ("prompts", 64, "problems per step, each with one completion"),
    ("micro-batch", 64, "completions read together; lower it to save memory"),
    ("max-new-tokens", 128, "longest completion, also L_max of the length reward"),
    ("temperature", 1.0, "temperature of sampling"),
    ("top-p", 1.0, "sample from the likeliest tokens of this mass"),
    ("top-k", 0, "sample from this many likeliest tokens, 0: all"),
    ("lr", 1e-3, "learning rate of AdamW"),
    ("rank", 16, "rank of the adapter"),
    ("alpha", 32.0, "the adapter's scale is alpha / rank"),
    ("gamma", 0.3, "strength of the gate (6); 0: no gate"),
    ("window", 3, "tokens that the gate looks ahead (8): CL-EGRSD; 0: EGRSD"),
    ("eps", 0.2, "bounds of the magnitude (2): 1 - eps and 1 + eps"),
    ("floor", 0.1, "least value of the gate (6)"),
)
BETA = 0.5  # largest extra reward for being short
INSTRUCTION = "Reason step by step and put the final answer in \\boxed{}."


# ---- two prompts


def student_prompt(tokenizer, problem):
    """Token ids of what the student sees."""
    return encode(tokenizer, f"{problem}\n\n{INSTRUCTION}")


def teacher_prompt(tokenizer, problem, solution):
    """Token ids of what the teacher sees: the reference solution, too."""
    shown = f"[Reference solution]\n{solution}\n[End of reference solution]"
    request = "Make sure you understand the reference solution, then solve the problem anew in your own words."
    return encode(tokenizer, f"{problem}\n\n{shown}\n\n{request} {INSTRUCTION}")


def encode(tokenizer, text):
    messages = [{"role": "user", "content": text}]
    switches = {"enable_thinking": False, "thinking": False}  # names that chat templates use
    return tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        return_dict=False,
        sanitize_control_tokens=True,  # a problem that spells one does not become one
        **switches,
    )


# ---- two readers in one model


class LoRA(nn.Module):
    """W x + (alpha / rank) B A x, arXiv 2106.09685. W is frozen, B is zero at the start."""

    on = True  # in all layers: True to sample and to read as the student, False as the teacher

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x):
        y = self.base(x)
        if not LoRA.on:
            return y
        return y + self.scale * (x @ self.A.T @ self.B.T)


def add_lora(model, rank, alpha):
    """Put an adapter on every linear layer but the head. Returns the parameters to train."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            model.set_submodule(name, LoRA(module, rank, alpha))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def merge(model):
    """Add the adapter to W: an ordinary model is left."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRA):
            module.base.weight += module.scale * module.B @ module.A
            model.set_submodule(name, module.base)


def read(model, prompts, completions):
    """log p of the completions' tokens, the entropy H of the next-token distribution, a mask: [B, T] each.

    Token ids in, nats out. One forward pass over prompt + completion; nothing is sampled.
    """
    rows = [torch.tensor(prompt + ids) for prompt, ids in zip(prompts, completions, strict=True)]
    # Padding goes on the right, where no token sees it.
    padded = pad_sequence(rows, batch_first=True).to(model.device)
    logits = model(input_ids=padded).logits
    logp, H, mask = [], [], []
    for row, prompt, ids in zip(logits, prompts, completions, strict=True):
        start = len(prompt) - 1  # the position before a token predicts it
        log_probs = row[start : start + len(ids)].log_softmax(-1)  # [T, V]
        tokens = torch.tensor(ids, device=model.device).unsqueeze(-1)
        logp.append(log_probs.gather(-1, tokens).squeeze(-1))
        H.append(torch.special.entr(log_probs.exp()).sum(-1))  # (4): - sum_v p(v) log p(v)
        mask.append(torch.ones_like(logp[-1], dtype=torch.bool))
    return [pad_sequence(values, batch_first=True) for values in (logp, H, mask)]


# ---- sampling and reward


@torch.no_grad()
def sample(model, prompts):
    """A completion of every prompt: token ids, the stop token included where there is one."""
    rows = [torch.tensor(prompt, device=model.device) for prompt in prompts]
    ones = [torch.ones_like(row) for row in rows]
    padded = pad_sequence(rows, batch_first=True, padding_side="left")
    seen = pad_sequence(ones, batch_first=True, padding_side="left")
    rows = model.generate(padded, attention_mask=seen)
    stop_ids = model.generation_config.eos_token_id
    completions = []
    for row in rows[:, padded.shape[1] :].tolist():
        ends = [t + 1 for t, token in enumerate(row) if token in stop_ids]
        completions.append(row[: ends[0]] if ends else row)
    return completions


def is_correct(text, answer):
    """Whether the last box holds the answer, as a string."""
    _, box, rest = text.rpartition("\\boxed{")
    inside = re.match(r"((?:[^{}]|\{[^{}]*\})*)\}", rest)
    if not box or not inside:
        return False
    return inside[1].strip() == answer.strip()


def shaped_reward(correct, length, max_length):
    """A correct completion earns more if it is short."""
    return 1 + BETA * (1 - length / max_length) if correct else 0.0


# ---- the objective


class RunningAdvantage:
    """A: how much better a reward is than those of earlier steps. Ten steps of warm-up: r - 0.5."""

    def __init__(self):
        self.steps = 0
        self.rewards = []

    def advantage(self, rewards):
        """rewards [B] -> A [B]"""
        if self.steps < 10 or min(self.rewards) == max(self.rewards):
            return rewards - 0.5
        return (rewards - fmean(self.rewards)) / pstdev(self.rewards)  # (9)

    def update(self, rewards):
        """One more finished step."""
        self.steps += 1
        self.rewards += rewards.tolist()


def egrsd_loss(
    student_logp, teacher_logp, H, mask, A, max_H, num_tokens, gamma, window, eps, floor
):
    """A micro-batch's share of the step's loss, a scalar.

    log-probs, H and mask [B, T], A [B]. max_H, the largest H, and num_tokens are the whole step's.
    """
    A = A.unsqueeze(-1)  # [B, 1]
    delta = (teacher_logp - student_logp).detach()
    # Where A > 0, w is above 1 if the teacher likes the token more than the student does. Where A < 0,
    # w is above 1 if the teacher likes it less.
    w = torch.exp(A.sign() * delta).clamp(1 - eps, 1 + eps)  # (2)

    H = H.masked_fill(~mask, torch.inf)
    ahead = nn.functional.pad(H, (0, window), value=torch.inf)
    least_H = ahead.unfold(1, window + 1, 1).amin(-1)  # (8): of this token and the next `window`
    H_hat = least_H / max(1, max_H)  # (5): max_H is of the whole step
    omega = (1 - gamma * H_hat).clamp(floor, 1)  # (6): is the teacher sure?

    A_hat = A * w * omega  # [B, T]
    # The mask leaves padding out, where A_hat means nothing.
    return -(A_hat[mask] * student_logp[mask]).sum() / num_tokens  # (7): num_tokens of the step


def backward(model, student_prompts, teacher_prompts, completions, A, args):
    """Add the gradient of the step's loss to the adapter's; returns the loss."""
    starts = range(0, len(completions), args.micro_batch)
    parts = [slice(start, start + args.micro_batch) for start in starts]
    LoRA.on = False
    with torch.no_grad():
        readings = [read(model, teacher_prompts[part], completions[part]) for part in parts]
    LoRA.on = True
    max_H = max(H.max().item() for _, H, _ in readings)
    num_tokens = sum(map(len, completions))

    total = 0.0
    how = (args.gamma, args.window, args.eps, args.floor)
    for part, (teacher_logp, H, mask) in zip(parts, readings, strict=True):
        logp, _, _ = read(model, student_prompts[part], completions[part])  # H is the teacher's
        loss = egrsd_loss(logp, teacher_logp, H, mask, A[part], max_H, num_tokens, *how)
        loss.backward()
        total += loss.item()
    return total


# ---- the loop


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, text in FLAGS:
        text = f"{text} (default: {default})"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    args = parser.parse_args()
    if args.model == "toy":
        import toy

        args.model = toy.resolve("toy", "model")
        args.data = args.data or toy.resolve("toy", "train.jsonl")
    return args


def main():
    args = arguments()
    random.seed(args.seed)
    torch.manual_seed(args.seed)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    parameters = add_lora(model, args.rank, args.alpha)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    baseline = RunningAdvantage()
    # Sample from p_S itself: the model's own settings may have a repetition penalty, for example.
    usual_settings = model.generation_config
    stop_ids = torch.tensor(usual_settings.eos_token_id).flatten().tolist()  # one or several
    stop_ids.append(tokenizer.eos_token_id)  # it may be another one
    model.generation_config = GenerationConfig(
        do_sample=True,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        eos_token_id=stop_ids,
        pad_token_id=0,  # hidden by the attention mask
    )
    with open(args.data) as lines:
        problems = [json.loads(line) for line in lines]

    bar = tqdm(range(args.steps), unit=" steps")
    for _ in bar:
        batch = random.sample(problems, args.prompts)
        prompts = [student_prompt(tokenizer, x["problem"]) for x in batch]
        shown = [teacher_prompt(tokenizer, x["problem"], x["solution"]) for x in batch]
        completions = sample(model, prompts)

        rewards = []
        for problem, ids in zip(batch, completions, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            # a completion that was cut off at --max-new-tokens is wrong
            correct = ids[-1] in stop_ids and is_correct(text, problem["answer"])
            rewards.append(shaped_reward(correct, len(ids), args.max_new_tokens))
        rewards = torch.tensor(rewards, device=device)
        A = baseline.advantage(rewards)

        loss = backward(model, prompts, shown, completions, A, args)
        nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        baseline.update(rewards)  # only now: no reward is part of its own baseline
        accuracy = (rewards > 0).float().mean().item()
        bar.set_postfix(
            loss=loss, accuracy=accuracy, length=sum(map(len, completions)) / len(batch)
        )

    merge(model)
    model.generation_config = usual_settings
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"the trained model is {args.out}")


if __name__ == "__main__":
    main()
