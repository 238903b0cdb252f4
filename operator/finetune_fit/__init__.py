"""What a fine-tuning needs: GPU memory, disk, time and money, estimated before anything is started.

Pure arithmetic on the standard library, so that the trainer (which refuses what cannot fit before it loads weights),
the command line (`finetune plan`, without a cluster and without torch) and the operator (costs) all count alike.
"""
