// A selector over channels that reads as many bytes as the socket reports (`InputStream.available`, FIONREAD). It answers each POST
// with the length and the SHA-256 of its body, and everything else with many bytes.

import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.util.HexFormat;

class NioServer {
    // State of one connection: the head being read, then the body.
    static class Connection {
        final StringBuilder line = new StringBuilder();
        final MessageDigest digest;
        boolean inBody, chunked, lastChunk, expects;
        long left, length;

        Connection() throws Exception {
            digest = MessageDigest.getInstance("SHA-256");
        }

        void head(String line) {
            var lower = line.toLowerCase();
            if (lower.startsWith("content-length:")) {
                left = Long.parseLong(line.substring(15).trim());
            } else if (lower.startsWith("transfer-encoding:")) {
                chunked = true;
            } else if (lower.startsWith("expect:")) {
                expects = true;
            }
        }

        // Consumes the bytes read; returns the bytes to send.
        String take(ByteBuffer bytes) {
            var out = new StringBuilder();
            while (bytes.hasRemaining()) {
                if (inBody && left > 0) {
                    int count = (int) Math.min(left, bytes.remaining());
                    digest.update(bytes.array(), bytes.position(), count);
                    bytes.position(bytes.position() + count);
                    left -= count;
                    length += count;
                } else {
                    char byt = (char) bytes.get();
                    if (byt != '\n') {
                        line.append(byt);
                        continue;
                    }
                    var whole = line.toString().trim();
                    line.setLength(0);
                    if (!inBody && !whole.isEmpty()) {
                        head(whole);
                    } else if (!inBody) {
                        inBody = true;
                        if (expects) {
                            out.append("HTTP/1.1 100 Continue\r\n\r\n");
                        }
                    } else if (!whole.isEmpty()) {
                        left = Long.parseLong(whole, 16);
                        lastChunk = left == 0;
                        continue;
                    } else if (!lastChunk) {
                        continue;
                    }
                }
                if (inBody && left == 0 && (!chunked || lastChunk)) {
                    var body = length + " " + HexFormat.of().formatHex(digest.digest());
                    if (length == 0) {
                        body = "x".repeat(400_000);
                    }
                    out.append("HTTP/1.1 200 OK\r\ncontent-length: ").append(body.length()).append("\r\n\r\n").append(body);
                    inBody = chunked = lastChunk = expects = false;
                    length = 0;
                }
            }
            return out.toString();
        }
    }

    public static void main(String[] arguments) throws Exception {
        var selector = Selector.open();
        var listener = ServerSocketChannel.open();
        listener.bind(new InetSocketAddress(InetAddress.getLoopbackAddress(), 0), 512);
        listener.configureBlocking(false);
        listener.register(selector, SelectionKey.OP_ACCEPT);
        System.out.println("listening on 127.0.0.1:" + listener.socket().getLocalPort());
        while (true) {
            selector.select();
            for (var keys = selector.selectedKeys().iterator(); keys.hasNext(); ) {
                var key = keys.next();
                keys.remove();
                if (key.isAcceptable()) {
                    var channel = listener.accept();
                    channel.configureBlocking(false);
                    channel.register(selector, SelectionKey.OP_READ, new Connection());
                    continue;
                }
                var channel = (SocketChannel) key.channel();
                try {
                    serve(channel, (Connection) key.attachment());
                } catch (java.io.IOException error) {
                    channel.close();
                }
            }
        }
    }

    static void serve(SocketChannel channel, Connection connection) throws java.io.IOException {
        int available = available(channel);
        if (available == 0) {
            // The socket reports the end.
            if (channel.read(ByteBuffer.allocate(1)) < 0) {
                channel.close();
            } else {
                throw new IllegalStateException("a byte where FIONREAD said 0");
            }
            return;
        }
        var buffer = ByteBuffer.allocate(available);
        while (buffer.hasRemaining() && channel.read(buffer) > 0) {
        }
        buffer.flip();
        var out = ByteBuffer.wrap(connection.take(buffer).getBytes(StandardCharsets.US_ASCII));
        while (out.hasRemaining()) {
            channel.write(out);
        }
    }

    // SocketAdaptor's stream rejects non-blocking channels, so this calls the channel's own method.
    static int available(SocketChannel channel) throws java.io.IOException {
        try {
            var method = channel.getClass().getDeclaredMethod("available");
            method.setAccessible(true);
            return (int) method.invoke(channel);
        } catch (ReflectiveOperationException error) {
            throw new java.io.IOException(error);
        }
    }
}
