/** The Worker in workerd with a real D1. The tests send webhooks, signed like Replicate's. */
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import test, { after, before, beforeEach } from "node:test";
import { validateWebhook } from "replicate";
import { signatureHeaders } from "./gateway.js";
import { bundledFiles, createTables, startReceiver, type Receiver } from "./workerd.js";

const SECRET = `whsec_${Buffer.from("the account's secret").toString("base64")}`;
const VOCALS = "https://replicate.delivery/a/vocals.wav";
const INSTRUMENTAL = "https://replicate.delivery/b/instrumental.wav";
const now = (): number => Math.floor(Date.now() / 1000);
const messageId = (): string => `msg_${randomUUID()}`;

let receiver: Receiver;
before(async () => (receiver = await startReceiver(SECRET)));
after(() => receiver.close());
beforeEach(async () => {
  await receiver.database.batch(["jobs", "deliveries"].map((t) => receiver.database.prepare(`DELETE FROM ${t}`)));
});

function prediction(changes: object = {}): string {
  // The instrumental was uploaded first.
  const whole = { id: "p1", status: "succeeded", input: { audio: "x" }, output: [INSTRUMENTAL, VOCALS], error: null };
  return JSON.stringify({ ...whole, ...changes });
}

async function send(body: string, headers: Record<string, string>, method = "POST"): Promise<[number, string]> {
  const response = await fetch(receiver.url, { method, headers, ...(method === "POST" && { body }) });
  return [response.status, (await response.text()).trim()];
}

const STALE = [401, "the webhook's timestamp is too old, or in the future"];
const FORGED = [401, "no signature of the webhook is valid"];
const INCOMPLETE = [401, "the webhook's id, timestamp or signature is missing"];
const REPLAYED = [401, "the webhook was already handled"];

async function isRefused(expected: (number | string)[], body: string, headers: Record<string, string>): Promise<void> {
  const rows = await receiver.rows();
  assert.deepEqual(await send(body, headers), expected);
  assert.deepEqual(await receiver.rows(), rows);
}

test("a signed webhook is stored with its stems by name", async () => {
  assert.deepEqual(await send(prediction(), signatureHeaders(SECRET, messageId(), prediction())), [200, "stored"]);
  const [row, ...others] = await receiver.rows();
  assert.deepEqual(others, []);
  assert.deepEqual({ ...row, stems: JSON.parse(row!.stems!) }, {
    replicate_id: "p1",
    status: "succeeded",
    stems: { vocals: VOCALS, instrumental: INSTRUMENTAL },
    error: null,
  });
});

test("the bundle has what checks webhooks, and neither the client nor npm's replicate", async () => {
  const names = (await bundledFiles()).map((name) => name.replace("node_modules/music-separation/dist/esm/", ""));
  assert.deepEqual(names.sort(), ["errors.js", "prediction.js", "stems.js", "webhook.js", "worker.ts"]);
});

test("npm's replicate accepts the same signature", async () => {
  const headers = signatureHeaders(SECRET, "msg_1", prediction());
  const [id, timestamp, signature] = Object.values(headers) as [string, string, string];
  assert.equal(await validateWebhook({ id, timestamp, signature, body: prediction(), secret: SECRET }), true);
});

test("one valid signature among several is enough", async () => {
  const headers = signatureHeaders(SECRET, messageId(), prediction());
  const others = [signatureHeaders("whsec_b2xk", "x", "y")["webhook-signature"], "v1a,AAAA", "v1,%%%", "v1,", ""];
  headers["webhook-signature"] = [...others, headers["webhook-signature"], ...others].join(" ");
  assert.deepEqual(await send(prediction(), headers), [200, "stored"]);
});

test("a forged signature is answered with 401 and stores nothing", async () => {
  const body = prediction();
  const headers = signatureHeaders(SECRET, messageId(), body);
  const signature = headers["webhook-signature"];
  const forgeries: Record<string, string>[] = [
    signatureHeaders(`whsec_${Buffer.from("another secret").toString("base64")}`, messageId(), body),
    { ...headers, "webhook-id": messageId() },
    { ...headers, "webhook-timestamp": String(now() + 7) },
    { ...headers, "webhook-signature": signature.replace("v1,", "v2,") },
    { ...headers, "webhook-signature": signature.replace("v1,", "") },
    { ...headers, "webhook-signature": signature.slice(0, -6) },
    { ...headers, "webhook-signature": "v1," },
    { ...headers, "webhook-signature": `v1,${Buffer.alloc(32).toString("base64")}` },
  ];
  for (const forged of forgeries) await isRefused(FORGED, body, forged);
});

test("a body changed by a single space is answered with 401", async () => {
  const headers = signatureHeaders(SECRET, messageId(), prediction());
  await isRefused(FORGED, prediction().replace("replicate.delivery", "evil.example"), headers);
  await isRefused(FORGED, `${prediction()} `, headers);
  await isRefused(FORGED, "", headers);
});

test("a webhook with a missing header is answered with 401", async () => {
  for (const missing of ["webhook-id", "webhook-timestamp", "webhook-signature"] as const) {
    const { [missing]: _, ...headers } = signatureHeaders(SECRET, messageId(), prediction());
    await isRefused(INCOMPLETE, prediction(), headers);
    await isRefused(INCOMPLETE, prediction(), { ...headers, [missing]: "" });
  }
});

test("a signed timestamp more than five minutes off is answered with 401", async () => {
  for (const seconds of [-302, 310, -86400, 86400]) {
    await isRefused(STALE, prediction(), signatureHeaders(SECRET, messageId(), prediction(), now() + seconds));
  }
  for (const timestamp of [NaN, now() * 1000, now() + 0.5, -now()]) {
    await isRefused(STALE, prediction(), signatureHeaders(SECRET, messageId(), prediction(), timestamp));
  }
  for (const seconds of [-290, 290]) {
    const headers = signatureHeaders(SECRET, messageId(), prediction(), now() + seconds);
    assert.deepEqual(await send(prediction(), headers), [200, "stored"]);
  }
});

test("replays are answered with 401, with the same or a new timestamp, even many at once", async () => {
  const id = messageId();
  const headers = signatureHeaders(SECRET, id, prediction());
  const answers = await Promise.all(Array.from({ length: 20 }, () => send(prediction(), headers)));
  assert.deepEqual(answers.filter(([status]) => status === 200).length, 1);
  await isRefused(REPLAYED, prediction(), headers);
  await isRefused(REPLAYED, prediction(), signatureHeaders(SECRET, id, prediction(), now() + 3));
});

test("a replayed earlier stage does not change a later row", async () => {
  const starting = prediction({ status: "starting", output: null });
  const headers = signatureHeaders(SECRET, messageId(), starting);
  assert.deepEqual(await send(starting, headers), [200, "stored"]);
  const processing = prediction({ status: "processing", output: null });
  assert.deepEqual(await send(processing, signatureHeaders(SECRET, messageId(), processing)), [200, "stored"]);
  await isRefused(REPLAYED, starting, headers);
  assert.equal((await receiver.rows())[0]!.status, "processing");
});

test("handled ids are deleted only when their timestamp is too old", async () => {
  const ids = async (): Promise<unknown[]> =>
    (await receiver.database.prepare("SELECT * FROM deliveries").all()).results.map((row) => row["webhook_id"]);
  const insert = receiver.database.prepare("INSERT INTO deliveries VALUES (?1, ?2)");
  await receiver.database.batch([insert.bind("old", now() - 303), insert.bind("young", now() - 290)]);
  await send(prediction(), signatureHeaders(SECRET, "new", prediction()));
  assert.deepEqual((await ids()).sort(), ["new", "young"]);
});

test("a webhook that could not be stored is stored on a retry with the same id", async () => {
  const id = messageId();
  await receiver.database.prepare("DROP TABLE jobs").run();
  const [status] = await send(prediction(), signatureHeaders(SECRET, id, prediction(), now() - 10));
  assert.equal(status, 500);
  await createTables(receiver.database);
  assert.deepEqual(await send(prediction(), signatureHeaders(SECRET, id, prediction())), [200, "stored"]);
  assert.equal((await receiver.rows()).length, 1);
});

test("another webhook for a finished prediction is answered with 200 and changes nothing", async () => {
  await send(prediction(), signatureHeaders(SECRET, messageId(), prediction()));
  const rows = await receiver.rows();
  const later = [
    prediction(),
    prediction({ output: ["https://elsewhere/vocals.wav", "https://elsewhere/instrumental.wav"] }),
    prediction({ status: "processing", output: null }),
    prediction({ status: "failed", output: null, error: "no" }),
  ];
  for (const body of later) {
    assert.deepEqual(await send(body, signatureHeaders(SECRET, messageId(), body)), [200, "stored"]);
    assert.deepEqual(await receiver.rows(), rows);
  }
});

test("failed, canceled and incomplete predictions are stored with their error", async () => {
  const bodies = [
    prediction({ id: "f", status: "failed", output: null, error: "Prediction failed: Async prediction failed: AudioError: it is not audio" }),
    prediction({ id: "c", status: "canceled", output: null }),
    prediction({ id: "i", input: { stems: "all_4" } }),
    prediction({ id: "n", output: null }),
    prediction({ id: "u", input: { stems: "all_5" } }),
    prediction({ id: "t", input: { two_stems: "drums" }, output: ["https://h/no_drums.mp3", "https://h/drums.mp3"] }),
  ];
  for (const body of bodies) {
    assert.deepEqual(await send(body, signatureHeaders(SECRET, messageId(), body)), [200, "stored"]);
  }
  assert.deepEqual((await receiver.rows()).map((row) => [row.replicate_id, row.status, row.stems, row.error]), [
    ["f", "failed", null, "it is not audio"],
    ["c", "canceled", null, "prediction c was canceled"],
    ["i", "failed", null, "expected the stems vocals, drums, bass, other, got instrumental, vocals"],
    ["n", "failed", null, "the prediction's output is not a list of URLs: null"],
    ["u", "failed", null, "unknown choice of stems: all_5"],
    ["t", "succeeded", '{"drums":"https://h/drums.mp3","no_drums":"https://h/no_drums.mp3"}', null],
  ]);
});

test("no prediction is answered with 400, another method with 405, too large a body with 413", async () => {
  for (const body of ["[]", "null", '"p1"', "{", "{}", prediction({ id: 7 }), prediction({ status: "done" })]) {
    await isRefused([400, "the webhook's body is not a prediction"], body, signatureHeaders(SECRET, messageId(), body));
  }
  for (const method of ["GET", "HEAD", "PUT", "DELETE"]) {
    assert.equal((await send("", signatureHeaders(SECRET, messageId(), ""), method))[0], 405);
  }
  const long = prediction({ logs: "x".repeat(2 ** 20) });
  await isRefused([413, "the webhook has more than 1048576 bytes"], long, signatureHeaders(SECRET, messageId(), long));
  const nearly = prediction({ logs: "x".repeat(2 ** 20 - prediction({ logs: "" }).length) });
  assert.equal(nearly.length, 2 ** 20);
  assert.deepEqual(await send(nearly, signatureHeaders(SECRET, messageId(), nearly)), [200, "stored"]);
});

test("quotes and non-ASCII characters are stored unchanged", async () => {
  const body = prediction({ status: "failed", output: null, error: `it's "müde" \u{1f3b5}'); DROP TABLE jobs;--` });
  await send(body, signatureHeaders(SECRET, messageId(), body));
  assert.equal((await receiver.rows())[0]!.error, `it's "müde" \u{1f3b5}'); DROP TABLE jobs;--`);
});

test("a Worker with a malformed secret stores nothing", async () => {
  for (const secret of ["", "whsec_", "whsec_%", Buffer.from("no prefix").toString("base64")]) {
    const broken = await startReceiver(secret);
    try {
      const headers = signatureHeaders(secret, messageId(), prediction());
      assert.equal((await fetch(broken.url, { method: "POST", headers, body: prediction() })).status, 500);
      assert.deepEqual(await broken.rows(), []);
    } finally {
      await broken.close();
    }
  }
});
