"""What the terminal and the shell around it decide: the width of lines, variables, completion."""
