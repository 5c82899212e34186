/** A file of the server, under the name that the server gives it. `progress` gets shares. Throws an Error that says why there
is none. */
async function fetched(url, signal, progress) {
  const response = await fetch(url, { signal });
  if (!response.ok) throw new Error(await response.text());
  const header = name => response.headers.get(name), reader = response.body.getReader(), parts = [];
  for (let at = 0, part; !(part = await reader.read()).done;) {
    parts.push(new Blob([part.value])); // which the browser may keep on disk
    progress((at += part.value.length) / Number(header("Content-Length")));
  }
  const [, name] = /''(.*)$/.exec(header("Content-Disposition"));
  return new File(parts, decodeURIComponent(name), { type: header("Content-Type") });
}
