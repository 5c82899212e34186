import { SeparationError } from "./errors.js";
import { readPrediction, type Separation } from "./prediction.js";

export type { Analysis, Separation, Status } from "./prediction.js";
export { PredictionError, SeparationError, StemsError, type ErrorKind } from "./errors.js";

const TOLERANCE_SECONDS = 5 * 60;
const MAX_BODY_BYTES = 1024 * 1024;

/** A webhook whose signature is valid. */
export interface Webhook {
  /** The same for all attempts to send it. Handle each id once, to be safe from replays. */
  id: string;
  /** Unix time in seconds. */
  sentAt: number;
  separation: Separation;
}

/** The request is not a webhook of yours. */
export class WebhookError extends SeparationError {
  override readonly name = "WebhookError";
  /** The HTTP status to answer with. */
  readonly httpStatus: 400 | 401 | 405 | 413;

  constructor(message: string, httpStatus: 400 | 401 | 405 | 413) {
    super(message, "webhook");
    this.httpStatus = httpStatus;
  }

  /** The answer to send. */
  toResponse(): Response {
    const headers = this.httpStatus === 405 ? { allow: "POST" } : undefined;
    return new Response(`${this.message}\n`, { status: this.httpStatus, ...(headers && { headers }) });
  }
}

/**
 * Reads a webhook of Replicate. It must be signed with the account's secret, have been sent within the last five minutes
 * and have at most 1 MiB. It may be a replay of an earlier one: that is for you to find out, by its id.
 *
 * @param secret from GET /v1/webhooks/default/secret: whsec_ and base64.
 * @throws WebhookError if the request is not such a webhook.
 * @throws SeparationError if the secret is malformed.
 */
export async function receiveWebhook(request: Request, secret: string): Promise<Webhook> {
  if (request.method !== "POST") throw new WebhookError("the method is not allowed: send webhooks with POST", 405);
  const body = await readBody(request);
  const id = request.headers.get("webhook-id");
  const timestamp = request.headers.get("webhook-timestamp");
  const signatures = request.headers.get("webhook-signature");
  if (!id || !timestamp || !signatures) {
    throw new WebhookError("the webhook's id, timestamp or signature is missing", 401);
  }
  if (!/^\d{1,12}$/.test(timestamp) || Math.abs(Date.now() / 1000 - Number(timestamp)) > TOLERANCE_SECONDS) {
    throw new WebhookError("the webhook's timestamp is too old, or in the future", 401);
  }
  if (!(await isSigned(`${id}.${timestamp}.`, body, signatures, secret))) {
    throw new WebhookError("no signature of the webhook is valid", 401);
  }
  return { id, sentAt: Number(timestamp), separation: readSeparation(body) };
}

/** The raw bytes, because these are signed. Reads no more than MAX_BODY_BYTES. */
async function readBody(request: Request): Promise<Uint8Array> {
  const body = new Uint8Array(MAX_BODY_BYTES);
  let size = 0;
  for await (const chunk of request.body ?? []) {
    if (size + chunk.byteLength > MAX_BODY_BYTES) {
      throw new WebhookError(`the webhook has more than ${MAX_BODY_BYTES} bytes`, 413);
    }
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
  if (!secretBytes?.length) {
    throw new SeparationError("the webhooks' secret is malformed: it is whsec_ and base64", "options");
  }
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

function readSeparation(body: Uint8Array): Separation {
  let prediction: unknown;
  try {
    prediction = JSON.parse(new TextDecoder().decode(body));
  } catch (cause) {
    throw new WebhookError("the webhook's body is not a prediction", 400);
  }
  const separation = readPrediction(prediction);
  if (separation === null) throw new WebhookError("the webhook's body is not a prediction", 400);
  return separation;
}
