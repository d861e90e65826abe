// com.sun.net.httpserver: answers with the length and the SHA-256 of the body.

import com.sun.net.httpserver.HttpServer;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.security.MessageDigest;
import java.util.HexFormat;
import java.util.concurrent.Executors;

class JdkServer {
    public static void main(String[] arguments) throws Exception {
        var server = HttpServer.create(new InetSocketAddress(InetAddress.getLoopbackAddress(), 0), 512);
        server.createContext("/post", exchange -> {
            try {
                var digest = MessageDigest.getInstance("SHA-256");
                var buffer = new byte[65536];
                long length = 0;
                for (int read; (read = exchange.getRequestBody().read(buffer)) >= 0; length += read) {
                    digest.update(buffer, 0, read);
                }
                var body = (length + " " + HexFormat.of().formatHex(digest.digest())).getBytes();
                exchange.sendResponseHeaders(200, body.length);
                exchange.getResponseBody().write(body);
                exchange.close();
            } catch (java.security.NoSuchAlgorithmException error) {
                throw new java.io.IOException(error);
            }
        });
        server.setExecutor(Executors.newCachedThreadPool());
        server.start();
        System.out.println("listening on 127.0.0.1:" + server.getAddress().getPort());
    }
}
