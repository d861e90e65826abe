// Go's net/http: `/bulk` is the file in one piece, `/stream` in many, `/file` served as a file by net/http; `/post` returns the
// length and the SHA-256 of the body.
package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"
)

func main() {
	content, err := os.ReadFile(os.Args[1])
	if err != nil {
		panic(err)
	}
	http.HandleFunc("/bulk", func(response http.ResponseWriter, request *http.Request) {
		response.Header().Set("content-length", strconv.Itoa(len(content)))
		response.Write(content)
	})
	http.HandleFunc("/stream", func(response http.ResponseWriter, request *http.Request) {
		response.Header().Set("content-type", "text/event-stream")
		for rest := bytes.NewBuffer(content); rest.Len() > 0; {
			if _, err := response.Write(rest.Next(10_000)); err != nil {
				return
			}
			response.(http.Flusher).Flush()
			time.Sleep(time.Millisecond)
		}
	})
	http.HandleFunc("/post", func(response http.ResponseWriter, request *http.Request) {
		hash := sha256.New()
		length, err := io.Copy(hash, request.Body)
		if err != nil {
			return
		}
		fmt.Fprintf(response, "%d %x", length, hash.Sum(nil))
	})
	http.HandleFunc("/file", func(response http.ResponseWriter, request *http.Request) {
		http.ServeFile(response, request, os.Args[1])
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Printf("listening on %s\n", listener.Addr())
	panic(http.Serve(listener, nil))
}
