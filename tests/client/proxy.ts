/** A proxy in front of a container, which can answer 409 in its place or cut connections. */
import { createServer, request, type Server } from "node:http";
import type { AddressInfo } from "node:net";

export class Proxy {
  /** The requests that made predictions, or tried to. */
  creations = 0;
  /** So many of them are answered with 409, as by a busy container. */
  busy = 0;
  /** Cuts the client's connection after this, once the container has the request. */
  drops: (() => Promise<unknown>) | undefined;
  readonly #server: Server;

  constructor(container: string) {
    this.#server = createServer((received, response) => {
      if (received.method === "PUT" && ++this.creations <= this.busy) {
        received.resume();
        response.writeHead(409, { "content-type": "application/json" });
        response.end('{"error": "At capacity - all prediction slots busy", "status": "failed"}');
        return;
      }
      const options = { method: received.method!, headers: received.headers };
      const sent = request(container + received.url!, options, (answer) => {
        response.writeHead(answer.statusCode!, answer.headers);
        answer.pipe(response);
      });
      sent.on("error", () => response.destroy());
      response.on("close", () => sent.destroy());
      received.pipe(sent);
      received.on("end", () => this.drops?.().finally(() => response.destroy()));
    });
  }

  async listen(): Promise<string> {
    await new Promise<void>((resolve) => this.#server.listen(0, "127.0.0.1", resolve));
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  async close(): Promise<void> {
    this.#server.closeAllConnections();
    await new Promise((resolve) => this.#server.close(resolve));
  }
}
