// Texts: what differs between two, and how a request reads as a command or a program.

// At this many pairs of words the table of the comparison takes some tens of megabytes.
const LARGEST = 1.6e7;

// Words and signs, each with the space that follows it. A segmenter knows words where no spaces part them.
export function words(text) {
  const found = [];
  for (const { segment } of new Intl.Segmenter(undefined, { granularity: "word" }).segment(text)) {
    if (segment.trim() || !found.length) found.push({ word: segment, space: "" });
    else found.at(-1).space += segment;
  }
  return found;
}

// The steps from one text to the other, [{kind: "same" | "removed" | "added", text, count}], by a longest common
// subsequence of their words; null where the texts are too long for it.
export function difference(before, after) {
  const a = words(before);
  const b = words(after);
  let start = 0;
  while (start < a.length && start < b.length && a[start].word === b[start].word) start++;
  let end = 0;
  const most = Math.min(a.length, b.length) - start;
  while (end < most && a.at(-1 - end).word === b.at(-1 - end).word) end++;
  const [m, n] = [a.length - end, b.length - end];
  if ((m - start) * (n - start) > LARGEST) return null;

  const steps = [];
  const step = (kind, { word, space }) => {
    if (steps.at(-1)?.kind !== kind) steps.push({ kind, text: "", count: 0 });
    steps.at(-1).text += word + space;
    steps.at(-1).count++;
  };
  const common = lengths(a.slice(start, m), b.slice(start, n));
  let [i, j] = [start, start];
  b.slice(0, start).forEach((word) => step("same", word));
  while (i < m || j < n) {
    if (i < m && j < n && a[i].word === b[j].word) step("same", b[(i++, j++)]);
    else if (i < m && (j === n || common(i + 1 - start, j - start) >= common(i - start, j + 1 - start))) step("removed", a[i++]);
    else step("added", b[j++]);
  }
  b.slice(n).forEach((word) => step("same", word));
  return steps;
}

// The length of the longest common subsequence of what is left from i and from j on.
function lengths(a, b) {
  const width = b.length + 1;
  const grid = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      grid[i * width + j] =
        a[i].word === b[j].word
          ? grid[(i + 1) * width + j + 1] + 1
          : Math.max(grid[(i + 1) * width + j], grid[i * width + j + 1]);
  return (i, j) => grid[i * width + j];
}

// A request as a command. The key itself is never part of a text that is made to be passed on.
export function asCurl(url, body, withKey) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const key = withKey ? ' \\\n  -H "Authorization: Bearer $TRIMTAB_API_KEY"' : "";
  return `curl ${quoted(url)} \\\n  -H "Content-Type: application/json"${key} \\\n  -d ${quoted(JSON.stringify(body, null, 2))}\n`;
}

// A request as a program with OpenAI's client. JSON of strings, numbers, lists and objects is Python as well.
export function asPython(base, { knobs, ...body }, withKey) {
  const key = withKey ? 'os.environ["TRIMTAB_API_KEY"]' : '"none"';
  const lines = Object.entries({ ...body, extra_body: { knobs } }).map(
    ([name, value]) => `    ${name}=${JSON.stringify(value, null, 4).replaceAll("\n", "\n    ")},`,
  );
  return [
    ...(withKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(base)}, api_key=${key})`,
    "answer = client.chat.completions.create(",
    ...lines,
    ")",
    "print(answer.choices[0].message.content)",
    "",
  ].join("\n");
}
