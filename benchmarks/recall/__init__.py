"""The paper's recall experiments: tasks, backbones with and without Resona, training, report.

tasks/      what is asked: generators and their settings
backbones/  who answers: token mixers behind one interface
model       the language model around them, with the branch
config      cells and grids: JSON -> what is to be run
train       one cell, resumable
store       finished cells, one line of JSON each
capacity    the read error of a state of fixed size
paper       the figures of the paper; report and plots put ours beside them
"""
