#!/usr/bin/env bash
# Submits the whole way to Slurm: shards, all stages, evaluation, chained by dependencies.
set -uo pipefail

usage() {
    cat <<'TEXT'
usage: slurm/pipeline.sh --data DIR --run DIR [options] [-- arguments of launch/train.py]

  --preset NAME           sizes (nano)
  --stages A,B            only these; stages that they need must be finished in --run (default: all)
  --sbatch OPTIONS        options of sbatch for all training jobs, e.g. "--partition=gpu --gpus-per-node=8"
  --sbatch-STAGE OPTIONS  more options for one stage, e.g. --sbatch-sft "--nodes=4"
  --shards ARGUMENTS      shard a corpus first: arguments of python -m data_prep; may be given several times
  --vocab-size N          then train the tokenizer on all datasets in --data (DIR/tokenizer.model)
  --array TASKS           tasks of each sharding array, like 0-15%8 (0-3)
  --sbatch-shards OPTIONS options of sbatch for sharding, e.g. "--partition=cpu --cpus-per-task=16"
  --no-evaluate           no evaluation at the end
  --dry-run               print the sbatch commands, submit nothing

Stages that need nothing of each other run side by side. A stage starts when all it needs have succeeded; when one
fails, what needs it is canceled. After "--", key=value goes to all stages, STAGE.key=value to one. The
last lines are NAME JOBID, for scripts. MUOMNI_VENV and the variables of slurm/train.sbatch are passed on.
TEXT
}

readonly all_stages=(thinker audio_encoder vision_encoder codec talker sft)
# What a stage loads of earlier ones (Stage.upstream).
declare -rA needs=(
    [thinker]="" [audio_encoder]="" [vision_encoder]="" [codec]=""
    [talker]="codec" [sft]="thinker audio_encoder vision_encoder codec talker"
)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
export MUOMNI_ROOT=${MUOMNI_ROOT:-${here%/slurm}}
preset=nano data="" run="" array=0-3 dry_run="" do_evaluate=1 shard_options="" vocab_size=""
stages=("${all_stages[@]}") shards=() sharding="" all_options=() train_arguments=()
declare -A stage_options job_ids

die() {
    echo "pipeline.sh: $*" >&2
    exit 2
}

is_stage() { [[ " ${all_stages[*]} " == *" $1 "* ]]; }

parse() {
    local option
    while [ $# -gt 0 ]; do
        option=$1
        case $option in
            --) train_arguments=("${@:2}") && return ;;
            -h | --help) usage && exit 0 ;;
            --dry-run) dry_run=1 && shift && continue ;;
            --no-evaluate) do_evaluate="" && shift && continue ;;
        esac
        [ $# -ge 2 ] || die "$option: unknown, or its value is missing; see slurm/pipeline.sh --help"
        case $option in
            --preset) preset=$2 ;;
            --data) data=$2 ;;
            --run) run=$2 ;;
            --stages) IFS=, read -ra stages <<<"$2" ;;
            --sbatch) read -ra all_options <<<"$2" ;;
            --shards) shards+=("$2") ;;
            --vocab-size) vocab_size=$2 ;;
            --array) array=$2 ;;
            --sbatch-shards) shard_options=$2 ;;
            --sbatch-*)
                is_stage "${option#--sbatch-}" || die "$option: no such stage; stages: ${all_stages[*]}"
                stage_options[${option#--sbatch-}]=$2
                ;;
            *) die "unknown option $option; see slurm/pipeline.sh --help" ;;
        esac
        shift 2
    done
}

check() {
    local stage
    [ -n "$data" ] || die "--data is missing; name the folder of the datasets"
    [ -n "$run" ] || die "--run is missing; name the folder that all stages write to"
    for stage in "${stages[@]}"; do
        is_stage "$stage" || die "unknown stage '$stage'; stages: ${all_stages[*]}"
    done
    [ -f "$MUOMNI_ROOT/launch/train.py" ] || die "there is no $MUOMNI_ROOT/launch/train.py; set MUOMNI_ROOT to the repository"
    [ -n "$dry_run" ] || command -v sbatch >/dev/null || die "sbatch is not on the PATH; call this on a login node of a Slurm cluster"
    [ -n "$dry_run" ] || mkdir -p "$run" || die "cannot make $run"
    data=$(realpath -m "$data")
    run=$(realpath -m "$run")
}

# submit NAME DEPENDENCY-IDS OPTIONS-AND-SCRIPT...: sets job_ids[NAME].
submit() {
    local name=$1 after=$2 id
    shift 2
    local command=(sbatch --parsable --job-name="muomni-$name")
    [ -z "$after" ] || command+=(--dependency="afterok:${after// /:}" --kill-on-invalid-dep=yes)
    command+=("$@")
    if [ -n "$dry_run" ]; then
        echo "${command[*]@Q}"
        id=$name
    else
        id=$("${command[@]}") || {
            [ ${#job_ids[@]} -eq 0 ] || scancel "${job_ids[@]}"
            die "sbatch refused $name (see above); the jobs submitted before it were canceled"
        }
        id=${id%%;*} # with several clusters: ID;CLUSTER
    fi
    job_ids[$name]=$id
}

submit_shards() {
    local number=0 arguments words
    for arguments in "${shards[@]}"; do
        read -ra words <<<"$arguments"
        # shellcheck disable=SC2086 # several options
        submit "shards$number" "" --array="$array" --output="$run/slurm-shards$number-%A_%a.log" $shard_options \
            "$here/shard_array.sbatch" "${words[@]}"
        number=$((number + 1))
    done
    sharding=${job_ids[*]}
    [ -n "$vocab_size" ] || return 0
    # shellcheck disable=SC2086
    submit tokenizer "$sharding" --array=0-0 --output="$run/slurm-tokenizer-%A.log" $shard_options \
        "$here/shard_array.sbatch" tokenizer --data "$data" --vocab-size "$vocab_size" --out "$data/tokenizer.model"
    sharding=${job_ids[tokenizer]}
}

# The arguments after -- that are meant for a stage.
arguments_of() {
    local argument prefix
    for argument in "${train_arguments[@]}"; do
        prefix=${argument%%.*}
        if [[ $argument != -* ]] && is_stage "$prefix"; then
            [ "$prefix" != "$1" ] || stage_arguments+=("${argument#*.}")
        else
            stage_arguments+=("$argument")
        fi
    done
}

submit_stages() {
    local stage need after
    for stage in "${all_stages[@]}"; do
        [[ " ${stages[*]} " == *" $stage "* ]] || continue
        after=$sharding
        for need in ${needs[$stage]}; do
            after+=" ${job_ids[$need]:-}"
        done
        stage_arguments=()
        arguments_of "$stage"
        [ -n "$dry_run" ] || mkdir -p "$run/$stage"
        # shellcheck disable=SC2046,SC2086
        submit "$stage" "$(echo $after)" --output="$run/$stage/slurm-%j.log" "${all_options[@]}" \
            ${stage_options[$stage]:-} "$here/train.sbatch" \
            --stage "$stage" --preset "$preset" --data "$data" --run "$run" "${stage_arguments[@]}"
    done
}

# One node a stage, when all training is done: the talker is judged by the audio encoder, and so on.
submit_evaluation() {
    local stage after=""
    for stage in "${stages[@]}"; do
        after+=" ${job_ids[$stage]}"
    done
    for stage in "${stages[@]}"; do
        # shellcheck disable=SC2046,SC2086
        submit "evaluate-$stage" "$(echo $after)" --output="$run/$stage/slurm-evaluate-%j.log" \
            "${all_options[@]}" --nodes=1 "$here/train.sbatch" launch/evaluate.py \
            --stage "$stage" --data "$data" --run "$run"
    done
}

parse "$@"
check
submit_shards
submit_stages
[ -z "$do_evaluate" ] || submit_evaluation
[ -z "$dry_run" ] || exit 0
echo "watch them with: squeue -u $(id -un); logs are in $run/STAGE/slurm-JOBID.log"
for name in "${!job_ids[@]}"; do echo "$name ${job_ids[$name]}"; done | sort -t' ' -k2n
