# execute.sh PYTHON RULE NAME NOTEBOOK EXECUTED PARAMETERS...: one job of the Snakefile, a notebook run by papermill.
# The executed notebook is kept when a cell fails too, since it holds the traceback; the log stays only after a failure, for
# the case that papermill or the kernel itself died. `far reproduce` reads the lines that begin with @far.
set -u
python=$1 rule=$2 name=$3 notebook=$4 executed=$5 code=0
shift 5
mkdir -p "$(dirname "$executed")"
# FAR_GPUS=0,1,...: take the first GPU that no other job has locked. A lock goes with the last process of its job, however that ended.
until [ -z "${FAR_GPUS:-}" ]; do
  for gpu in ${FAR_GPUS//,/ }; do
    exec 9>"$(dirname "$executed")/../.gpu-$gpu"
    if flock -n 9; then export CUDA_VISIBLE_DEVICES=$gpu; break 2; fi
  done
  sleep 1
done
echo "@far start $rule $name 0 0 $executed"
"$python" "$(dirname "$0")/warm.py" papermill "$notebook" "$executed.part" --kernel python3 --no-progress-bar "$@" </dev/null >"$executed.log" 2>&1 || code=$?
if [ -e "$executed.part" ]; then mv -f "$executed.part" "$executed"; fi
if [ $code = 0 ]; then rm -f "$executed.log"; fi
echo "@far end $rule $name $code $SECONDS $executed"
exit $code
