# %% [markdown]
# # A fine-tuned classifier
#
# What docs/guide.md begins with, for those who have no classifier of their own: MiniLM fine-tuned
# with plain PyTorch on a table of texts and labels, and saved as transformers saves it.
#
#     python examples/fine_tune.py train.tsv my-classifier --text question --label coarse

# %%
import argparse
import csv

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from graphprune.models.loading.packaged import minilm

parser = argparse.ArgumentParser()
parser.add_argument("table", help="a header line, then a row each, with TABs")
parser.add_argument("folder")
parser.add_argument("--text", default="text")
parser.add_argument("--label", default="label")
parser.add_argument("--epochs", type=int, default=2)
options = parser.parse_args()

# %%
with open(options.table, encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
names = sorted({row[options.label] for row in rows})
_, checkpoint = minilm()  # or any hub id
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForSequenceClassification.from_pretrained(
    checkpoint, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
)

# %%
torch.manual_seed(0)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
steps = options.epochs * -(-len(rows) // 32)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
model.train()
for epoch in range(options.epochs):
    total = 0.0
    for part in torch.randperm(len(rows)).split(32):
        chosen = [rows[i] for i in part]
        batch = tokenizer(
            [row[options.text] for row in chosen],
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        )
        labels = torch.tensor([names.index(row[options.label]) for row in chosen])
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += loss.item() * len(chosen)
    print(f"epoch {epoch + 1}: loss {total / len(rows):.3f}")

model.save_pretrained(options.folder)
tokenizer.save_pretrained(options.folder)
