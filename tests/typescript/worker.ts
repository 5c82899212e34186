/**
 * A Cloudflare Worker that receives Replicate's webhooks and stores each prediction's stems in D1 (schema.sql).
 *
 * A request may change a row only if it is signed with the account's secret, was sent within the last five minutes, and
 * has not been handled before. All others are answered with 401.
 *
 * - A replay is a request whose `webhook-id` has been handled. When Replicate retries a webhook because it got no 2xx,
 *   it keeps the id and renews the timestamp. The id is stored in the same transaction as the row, so the retry of a
 *   webhook that could not be stored (500) does not count as a replay. If only the response was lost, the retry gets a
 *   harmless 401: the row is there.
 * - Ids are kept until their timestamp is too old; from then on, the timestamp alone refuses a replay.
 * - A prediction's row only moves forward (starting, processing, finished) and then never changes. Further webhooks
 *   with other ids are answered with 200 and change nothing: Replicate may send one twice, and an earlier stage's
 *   webhook may arrive after the final one.
 */
import { expectedStems, stemsByName, StemsError } from "./separation.js";

export interface Env {
  DB: D1Database;
  /** From GET /v1/webhooks/default/secret: whsec_ and base64. */
  REPLICATE_WEBHOOK_SECRET: string;
}

const TOLERANCE_SECONDS = 5 * 60;
const MAX_BODY_BYTES = 1024 * 1024;
const STATUSES = ["starting", "processing", "succeeded", "failed", "canceled", "aborted"];

interface Job {
  id: string;
  status: string;
  stems: Record<string, string> | null;
  error: string | null;
}

export default {
  async fetch(request: Request, env: Env): Promise<Response> {
    if (request.method !== "POST") {
      return answer(405, "the method is not allowed: send webhooks with POST", { allow: "POST" });
    }
    const body = await readBody(request);
    if (body === null) return answer(413, `the webhook has more than ${MAX_BODY_BYTES} bytes`);

    const id = request.headers.get("webhook-id");
    const timestamp = request.headers.get("webhook-timestamp");
    const signatures = request.headers.get("webhook-signature");
    if (!id || !timestamp || !signatures) return answer(401, "the webhook's id, timestamp or signature is missing");
    const now = Date.now() / 1000;
    if (!/^\d{1,12}$/.test(timestamp) || Math.abs(now - Number(timestamp)) > TOLERANCE_SECONDS) {
      return answer(401, "the webhook's timestamp is too old, or in the future");
    }
    if (!(await isSigned(`${id}.${timestamp}.`, body, signatures, env.REPLICATE_WEBHOOK_SECRET))) {
      return answer(401, "no signature of the webhook is valid");
    }

    const job = readJob(body);
    if (job === null) return answer(400, "the webhook's body is not a prediction");
    const [delivery] = await env.DB.batch([
      env.DB.prepare("INSERT INTO deliveries (webhook_id, sent_at) VALUES (?1, ?2) ON CONFLICT DO NOTHING").bind(
        id,
        Number(timestamp),
      ),
      env.DB.prepare(
        `INSERT INTO jobs (replicate_id, status, stems, error) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (replicate_id) DO UPDATE SET status = ?2, stems = ?3, error = ?4
         WHERE jobs.status IN ('starting', 'processing') AND ?2 <> 'starting'`,
      ).bind(job.id, job.status, job.stems && JSON.stringify(job.stems), job.error),
      env.DB.prepare("DELETE FROM deliveries WHERE sent_at < ?1").bind(now - TOLERANCE_SECONDS),
    ]);
    if (delivery?.meta.changes !== 1) return answer(401, "the webhook was already handled");
    return answer(200, "stored");
  },
} satisfies ExportedHandler<Env>;

function answer(status: number, text: string, headers?: Record<string, string>): Response {
  return new Response(`${text}\n`, { status, ...(headers && { headers }) });
}

/** The raw bytes, because these are signed; null if there are more than MAX_BODY_BYTES. Does not read more. */
async function readBody(request: Request): Promise<Uint8Array<ArrayBuffer> | null> {
  const body = new Uint8Array(MAX_BODY_BYTES);
  let size = 0;
  for await (const chunk of request.body ?? []) {
    if (size + chunk.byteLength > MAX_BODY_BYTES) return null;
    body.set(chunk, size);
    size += chunk.byteLength;
  }
  return body.subarray(0, size);
}

/**
 * Whether one of the space-separated signatures ("v1," and base64) is the HMAC-SHA256 of id, timestamp and body. There
 * are several while a secret is being replaced. `verify` compares in constant time.
 */
async function isSigned(prefix: string, body: Uint8Array, signatures: string, secret: string): Promise<boolean> {
  const secretBytes = secret.startsWith("whsec_") ? fromBase64(secret.slice("whsec_".length)) : null;
  if (!secretBytes?.length) throw new Error("REPLICATE_WEBHOOK_SECRET is malformed: set it to whsec_ and base64");
  const key = await crypto.subtle.importKey("raw", secretBytes, { name: "HMAC", hash: "SHA-256" }, false, ["verify"]);
  const prefixBytes = new TextEncoder().encode(prefix);
  const signed = new Uint8Array(prefixBytes.length + body.length);
  signed.set(prefixBytes);
  signed.set(body, prefixBytes.length);
  for (const signature of signatures.split(" ")) {
    const bytes = signature.startsWith("v1,") ? fromBase64(signature.slice("v1,".length)) : null;
    if (bytes && (await crypto.subtle.verify("HMAC", key, bytes, signed))) return true;
  }
  return false;
}

function fromBase64(text: string): Uint8Array<ArrayBuffer> | null {
  if (!/^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$/.test(text)) return null;
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

/** The row for a prediction; null if the body is not a prediction. */
function readJob(body: Uint8Array): Job | null {
  let prediction: { id?: unknown; status?: unknown; input?: unknown; output?: unknown; error?: unknown } | null;
  try {
    prediction = JSON.parse(new TextDecoder().decode(body));
  } catch {
    return null;
  }
  const { id, status, input, output, error } = prediction ?? {};
  if (typeof id !== "string" || !id || typeof status !== "string" || !STATUSES.includes(status)) return null;
  if (status !== "succeeded") return { id, status, stems: null, error: error ? String(error) : null };
  try {
    return { id, status, stems: stemsByName(output, expectedStems(input ?? {})), error: null };
  } catch (reason) {
    if (!(reason instanceof StemsError)) throw reason;
    return { id, status: "failed", stems: null, error: reason.message };
  }
}
