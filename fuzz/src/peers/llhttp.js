// Reads messages with the parser inside Node.js, llhttp. Standard input: length (4 bytes, little endian), kind (0 request, 1
// response, 2 response to HEAD), bytes. Standard output: length, JSON {messages, error}.
'use strict';
const fs = require('node:fs');
const { HTTPParser, methods, allMethods } = process.binding('http_parser');

function read(length) {
  const buffer = Buffer.alloc(length);
  for (let at = 0; at < length;) {
    const got = fs.readSync(0, buffer, at, length - at, null);
    if (got === 0) process.exit(0);
    at += got;
  }
  return buffer;
}

function parse(kind, bytes) {
  const messages = [];
  let message;
  const fresh = () => ({ start: '', target: '', fields: [], body: '', complete: false });
  const parser = new HTTPParser();
  parser.initialize(kind === 0 ? HTTPParser.REQUEST : HTTPParser.RESPONSE, {}, 1 << 20, 0);
  parser[HTTPParser.kOnMessageBegin | 0] = () => { message = fresh(); };
  // Called early for heads with many fields.
  parser[HTTPParser.kOnHeaders | 0] = (fields, url) => {
    message.fields.push(...fields);
    message.target += url;
  };
  parser[HTTPParser.kOnHeadersComplete | 0] = (major, minor, fields, method, url, status) => {
    if (fields) message.fields.push(...fields);
    if (url) message.target += url;
    message.start = kind === 0 ? (allMethods || methods)[method] : String(status);
    return kind === 2 ? 1 : 0;
  };
  parser[HTTPParser.kOnBody | 0] = (body) => { message.body += body.toString('latin1'); };
  parser[HTTPParser.kOnMessageComplete | 0] = () => {
    message.complete = true;
    messages.push(message);
  };
  let error = '';
  let result = parser.execute(bytes);
  if (result instanceof Error) {
    error = result.code;
  } else if (result === bytes.length) {
    result = parser.finish();
    if (result instanceof Error) error = result.code;
  } else {
    error = 'UPGRADE';
  }
  if (message && !message.complete) messages.push(message);
  parser.free?.();
  return { messages, error };
}

for (;;) {
  const head = read(5);
  const answer = Buffer.from(JSON.stringify(parse(head[4], read(head.readUInt32LE(0)))), 'utf8');
  const length = Buffer.alloc(4);
  length.writeUInt32LE(answer.length);
  fs.writeSync(1, length);
  for (let at = 0; at < answer.length;) at += fs.writeSync(1, answer, at);
}
