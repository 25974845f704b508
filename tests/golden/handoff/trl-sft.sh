#!/bin/bash
export RUN_DIR=out
accelerate launch --num_processes 1 trl/scripts/sft.py \
    --model_name_or_path Qwen/Qwen2.5-7B-Instruct \
    --dataset_name trl-lib/Capybara \
    --dtype bfloat16 \
    --learning_rate 5.0e-4 \
    --packing \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --use_peft --lora_r=32 --lora_alpha 16 \
    --lora_target_modules q_proj \
    --output_dir "$RUN_DIR"
