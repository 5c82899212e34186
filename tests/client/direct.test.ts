/** The client, and npm's replicate, on a container outside Replicate. */
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import test, { before } from "node:test";
import { AbortError, PredictionError, RequestError, SeparationError, Separator } from "music-separation";
import Replicate, { type FileOutput } from "replicate";
import { Agent, getGlobalDispatcher, setGlobalDispatcher } from "undici";
import { Proxy } from "./proxy.js";
import { dataUri, longSongFile, plain, plainLog, samples, songFile, until } from "./served.js";
import { startReceiver } from "./workerd.js";

const MODEL = "owner/separation:any";
let replicate: Replicate;
let separator: Separator;
let song: string;
let longSong: Blob;
before(async () => {
  replicate = new Replicate({ auth: "unused", baseUrl: plain() });
  separator = new Separator({ container: `${plain()}/` });
  song = dataUri(await readFile(songFile()));
  longSong = new Blob([new Uint8Array(await readFile(longSongFile()))]);
});

/** The lines of the container's log about predictions, such as "Starting prediction". */
async function logged(message: string, id = ""): Promise<string[]> {
  const lines = (await readFile(plainLog(), "utf8")).split("\n");
  return lines.filter((line) => line.includes(`"${message}"`) && line.includes(id));
}

async function failure(failing: Promise<unknown>): Promise<SeparationError> {
  const error: unknown = await failing.then(() => undefined, (reason: unknown) => reason);
  assert.ok(error instanceof SeparationError, `it failed with ${error}`);
  return error;
}

test("replicate.run with a version returns the stems in the order of the contract", async () => {
  const output = (await replicate.run(MODEL, { input: { audio: song, output_format: "flac" } })) as FileOutput[];
  assert.equal(output.length, 2);
  for (const file of output) {
    assert.match(file.toString(), /^data:audio\/flac;base64,/);
    assert.equal(await (await file.blob()).slice(0, 4).text(), "fLaC");
  }
});

test("the client names the stems in the order of the contract and reports the end of the job", async () => {
  const shares: number[] = [];
  const onProgress = (share: number): void => void shares.push(share);
  const stems = await separator.separate(song, { stems: "all_6", outputFormat: "flac", onProgress });
  assert.deepEqual(Object.keys(stems), ["vocals", "drums", "bass", "guitar", "piano", "other"]);
  assert.equal(new Set(Object.values(stems)).size, 6);
  assert.deepEqual(shares, [1]);
});

test("a file is sent inside the request and gives the same stems", async () => {
  const bytes = new Uint8Array(await readFile(songFile()));
  const expected = await samples(await separator.separate(song, { outputFormat: "flac" }));
  for (const file of [bytes, new Blob([bytes], { type: "audio/flac" })]) {
    assert.deepEqual(await samples(await separator.separate(file, { outputFormat: "flac" })), expected);
  }
});

test("a file that the container would refuse for its size is not sent", async () => {
  const error = await failure(separator.separate(new Blob([new Uint8Array(75_000_001)])));
  assert.equal(error.message, "the song has 76 MB, and a container takes files of up to 75 MB: give a URL");
  assert.equal(error.kind, "input");
});

test("a failed prediction has the container's sentence without prefixes, its kind and its id", async () => {
  const raw = await replicate.predictions.create({ version: "any", input: { audio: song, chunk_size: 4, overlap: 8 } });
  assert.match(String(raw.error), /^(Prediction failed: )+(Async prediction failed: )?InputError: overlap/);
  let started: string | undefined;
  const error = await failure(separator.separate(song, { chunkSize: 4, overlap: 8, onStart: (id) => (started = id) }));
  assert.ok(error instanceof PredictionError);
  assert.match(error.message, /^overlap \(8 s\) must be smaller than the chunk size \(4 s\)/);
  assert.deepEqual([error.kind, error.predictionId], ["input", started]);
  assert.equal((await logged("Starting prediction", started!)).length, 1);
  assert.ok((await separator.separate(song)).vocals);
});

test("one prediction right after another is never busy, even after failures", async () => {
  for (let i = 0; i < 20; i++) {
    const error = await failure(separator.separate(song, { chunkSize: 4, overlap: 8 }));
    assert.equal(error.kind, "input");
  }
});

test("a container that says that it is busy is asked again; one that stays busy is an error", async () => {
  const proxy = new Proxy(plain());
  const behind = new Separator({ container: await proxy.listen() });
  try {
    proxy.busy = 5;
    assert.ok((await behind.separate(song, { outputFormat: "mp3" })).vocals);
    assert.equal(proxy.creations, 6);
    proxy.busy = Infinity;
    const error = await failure(behind.separate(song));
    assert.match(error.message, /answered 409: At capacity - all prediction slots busy$/);
    assert.deepEqual([error.kind, (error as RequestError).httpStatus], ["busy", 409]);
  } finally {
    await proxy.close();
  }
});

test("an input out of range is refused by name", async () => {
  const error = await failure(separator.separate(song, { chunkSize: 99 }));
  assert.match(error.message, /answered 422: chunk_size: /);
  assert.equal(error.kind, "input");
});

test("a song that takes longer than fetch's patience is separated", async () => {
  const patient = getGlobalDispatcher();
  setGlobalDispatcher(new Agent({ headersTimeout: 300 })); // as if Node's fetch gave up after 300 ms, not 300 s
  try {
    const url = `${plain()}/predictions`;
    const body = JSON.stringify({ input: { audio: dataUri(Buffer.from(await longSong.arrayBuffer())) } });
    const request = fetch(url, { method: "POST", body, headers: { "content-type": "application/json" } });
    const error = (await request.then(() => undefined, (reason: unknown) => reason)) as Error;
    assert.equal((error.cause as Error).name, "HeadersTimeoutError");
    assert.ok((await separator.separate(longSong, { outputFormat: "mp3" })).vocals);
  } finally {
    setGlobalDispatcher(patient);
  }
});

test("an abort cancels the prediction in the container, and the next one is separated", async () => {
  const abort = new AbortController();
  let started = "";
  const onStart = (id: string): void => void (started = id);
  const separating = failure(separator.separate(longSong, { outputFormat: "flac", signal: abort.signal, onStart }));
  // Cog's server can lose a cancel that comes before the song has begun. The client's next one, 2 s later, may find it done.
  await until(async () => (started && (await logged("decoding", started)).length > 0 ? true : undefined));
  await new Promise((resolve) => setTimeout(resolve, 200));
  abort.abort("enough");
  const error = await separating;
  assert.ok(error instanceof AbortError);
  assert.deepEqual([error.kind, error.cause, error.predictionId], ["aborted", "enough", started]);
  await until(async () => ((await logged("Prediction cancelled", started)).length > 0 ? true : undefined));
  assert.ok((await separator.separate(song)).vocals);
});

test("an abort before the request, or while the container is busy, starts nothing", async () => {
  const proxy = new Proxy(plain());
  const behind = new Separator({ container: await proxy.listen() });
  try {
    assert.equal((await failure(behind.separate(song, { signal: AbortSignal.abort() }))).kind, "aborted");
    assert.equal(proxy.creations, 0);
    proxy.busy = Infinity;
    const before = (await logged("Starting prediction")).length;
    assert.equal((await failure(behind.separate(song, { signal: AbortSignal.timeout(200) }))).kind, "aborted");
    assert.equal((await logged("Starting prediction")).length, before);
  } finally {
    await proxy.close();
  }
});

test("a request whose connection drops makes one prediction, which the container cancels", async () => {
  const proxy = new Proxy(plain());
  const behind = new Separator({ container: await proxy.listen() });
  try {
    const [before, begun] = [(await logged("Starting prediction")).length, (await logged("decoding")).length];
    proxy.drops = async () => {
      // Cog's server can lose a cancel that comes before the song has begun.
      await until(async () => ((await logged("decoding")).length > begun ? true : undefined));
      await new Promise((resolve) => setTimeout(resolve, 200));
    };
    const error = await failure(behind.separate(longSong, { outputFormat: "flac" }));
    assert.ok(error instanceof RequestError);
    assert.equal(error.kind, "connection");
    await until(async () => ((await logged("Prediction cancelled", error.predictionId!)).length > 0 ? true : undefined));
    assert.deepEqual([proxy.creations, (await logged("Starting prediction")).length - before], [1, 1]);
  } finally {
    await proxy.close();
  }
});

test("start calls the webhook with the stems, and nothing else can be asked about a prediction", async () => {
  let body = "";
  const called = createServer(async (request, response) => {
    for await (const chunk of request) body += chunk;
    response.end();
  });
  await new Promise<void>((resolve) => called.listen(0, "127.0.0.1", resolve));
  try {
    const webhook = `http://127.0.0.1:${(called.address() as AddressInfo).port}`;
    const id = await separator.start(song, { outputFormat: "mp3", webhook });
    const prediction = await until(() => (body ? (JSON.parse(body) as { id: string; output: string[] }) : undefined));
    assert.deepEqual([prediction.id, prediction.output.length], [id, 2]);
    for (const asked of [separator.wait(id), separator.get(id)]) {
      const error = await failure(asked);
      assert.deepEqual([error.kind, error.predictionId], ["options", id]);
    }
    assert.match((await failure(separator.start(song))).message, /keeps no stems: use separate, or give a webhook/);
    await separator.cancel(id); // it has ended
  } finally {
    called.close();
  }
});

test("the token of Replicate is not sent to a container, but one given for it is", async () => {
  const seen: (string | undefined)[] = [];
  const listening = createServer((request, response) => {
    seen.push(request.headers.authorization);
    response.writeHead(403).end();
  });
  await new Promise<void>((resolve) => listening.listen(0, "127.0.0.1", resolve));
  process.env["REPLICATE_API_TOKEN"] = "r8_secret";
  try {
    const container = `http://127.0.0.1:${(listening.address() as AddressInfo).port}`;
    await failure(new Separator({ container }).separate(song));
    await failure(new Separator({ container, auth: "mine" }).separate(song));
    assert.deepEqual(seen, [undefined, "Bearer mine"]);
  } finally {
    delete process.env["REPLICATE_API_TOKEN"];
    listening.close();
  }
});

test("the container's own webhooks are not signed, so the Worker refuses them", async () => {
  const receiver = await startReceiver("whsec_c2VjcmV0");
  try {
    assert.ok((await separator.separate(song, { outputFormat: "mp3", webhook: receiver.url })).instrumental);
    assert.deepEqual(await receiver.rows(), []);
  } finally {
    await receiver.close();
  }
});
