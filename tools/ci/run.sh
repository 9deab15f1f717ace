#!/usr/bin/env bash
# Run a recipe in a pipeline: the report goes to the summary page, the verdict to the outputs, and
# the exit code stays svdexport's own.
#   RECIPE   recipe to run                      OUT      output folder
#   ARGS     more arguments, one a line         SVDEXPORT command, default: svdexport
#   GITHUB_STEP_SUMMARY, GITHUB_OUTPUT          files to append to; left alone where not set
set -uo pipefail
: "${RECIPE:?set RECIPE to the recipe to run}" "${OUT:?set OUT to the output folder}"
summary=${GITHUB_STEP_SUMMARY:-/dev/null}
outputs=${GITHUB_OUTPUT:-/dev/null}

args=()
while IFS= read -r line; do
  [ -n "$line" ] && args+=("$line")
done <<<"${ARGS:-}"

"${SVDEXPORT:-svdexport}" run "$RECIPE" --out "$OUT" ${args[@]+"${args[@]}"}
code=$?

# Only a run that passed is renamed into place; what another one found lies in its work folder.
work="$(dirname "$OUT")/.$(basename "$OUT").work/report"
case $code in
  0) verdict=pass reports=$OUT ;;
  3 | 4 | 5) verdict=fail reports=$work ;;
  7) verdict=inconclusive reports=$work ;;
  *) verdict=error reports='' ;;
esac

case $code in
  0) advice="The files in $OUT can be released." ;;
  1) advice="A bug in svdexport: report it with the log above." ;;
  2) advice="The recipe or an option is wrong, or its budget cannot be met." ;;
  3) advice="An input is broken, or a written file does not hold or compute what was meant." ;;
  4) advice="A quality gate failed: keep more parameters, or accept less with another limit." ;;
  5) advice="A speed or size gate failed: remove more parameters, or choose another type." ;;
  6) advice="Memory or disk ran out: the same command on a larger machine resumes." ;;
  7) advice="The machine was too noisy to say: run again with nothing else on its cores." ;;
  *) advice="The run was stopped; the same command resumes." ;;
esac

{
  # a report of an earlier run must not stand for this one
  if [ -n "$reports" ] && [ -f "$reports/summary.md" ]; then
    cat "$reports/summary.md"
  else
    echo "## svdexport: $verdict"
  fi
  printf '\nExit code %s. %s\n' "$code" "$advice"
} >>"$summary"
{
  echo "verdict=$verdict"
  echo "exit-code=$code"
  echo "reports=$reports"
} >>"$outputs"
echo "exit code $code: $advice" >&2
exit "$code"
