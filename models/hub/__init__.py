"""What other runtimes read beside the graph, in the words of the models' configurations."""
