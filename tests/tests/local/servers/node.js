// Node's http: `/bulk` is the file in one piece, `/stream` in many, `/file` the file piped; `/post` returns the length and the
// SHA-256 of the body.

const crypto = require("crypto");
const fs = require("fs");
const http = require("http");

const content = fs.readFileSync(process.argv[2]);

const server = http.createServer(async (request, response) => {
  switch (request.url) {
    case "/bulk":
      response.writeHead(200, { "content-length": content.length });
      return response.end(content);
    case "/post": {
      let length = 0;
      const hash = crypto.createHash("sha256");
      for await (const piece of request) {
        length += piece.length;
        hash.update(piece);
      }
      return response.end(`${length} ${hash.digest("hex")}`);
    }
    case "/file":
      response.writeHead(200, { "content-length": content.length });
      return fs.createReadStream(process.argv[2]).pipe(response);
    default:
      response.writeHead(200, { "content-type": "text/event-stream" });
      for (let at = 0; at < content.length; at += 10000) {
        if (!response.write(content.subarray(at, at + 10000))) {
          await new Promise((resolve) => response.once("drain", resolve));
        }
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
      return response.end();
  }
});

server.listen(0, "127.0.0.1", () => console.log(`listening on 127.0.0.1:${server.address().port}`));
